"""Every command of the README is executed, at reduced size; one that no reduction is known for fails here."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from slime_spec.launch.arguments import read_arguments
from slime_spec.launch.cli import HANDLERS

ROOT = Path(__file__).resolve().parents[2]
SMALL = "--num-rollout 1 --rollout-batch-size 2 --n-samples-per-prompt 2 --rollout-max-response-len 8"
# Prefix of a command -> what is appended so that it takes seconds; {out} is a temporary folder.
REDUCTIONS = {
    # Other values for the script's run, and the same run in other words: what is new of them is composed and planned.
    "bash scripts/run-smollm2-135M.sh --num-rollout": "--dry-run",
    "slime-spec train --config smollm2-135m --lr": "--dry-run",
    "slime-spec train experiment=": "--dry-run",
    "bash scripts/run-": f"{SMALL} --output-dir {{out}}/run --run-name readme",
    "bash scripts/test.sh": "--collect-only -q tests/metrics",
    "bash scripts/check.sh static": "",
    "slime-spec train --config smollm2-135m --dry-run": "",
    "slime-spec train --config smollm2-135m --enable-draft-training": "--dry-run",
    "slime-spec rollout": f"{SMALL} --output-dir {{out}}/run",
    "slime-spec config": "",
    "slime-spec models fetch": "",
    "slime-spec doctor": "",
    "slime-spec serve": "--help",
    "slime-spec draft train": "--help",
    "slime-spec bench main-job": "--help",
    "slime-spec bench engine": "--help",
    "slime-spec bench device": "--only ceilings --rounds 1",
    "slime-spec bench sglang": "--help",
    "slime-spec bench pays": "--help",
    "slime-spec bench drafts": "--help",
    "slime-spec report": "--help",
    "slime-spec tune": "--help",
    "slime-spec bench coordinator": "--help",
    "slime-spec bench robustness": "--count 5 --kind commands",
}


def commands() -> list[str]:
    """The lines of the README's bash blocks, comments and prompts left out, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    lines = (line.partition("  #")[0].strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def reduced(command: str, out: Path) -> str:
    for prefix, extra in REDUCTIONS.items():
        if command.startswith(prefix):
            return f"{command} {extra.format(out=shlex.quote(str(out)))}"
    raise AssertionError(f"the README has a command that no test runs: {command}")


def test_the_readme_shows_the_two_commands():
    assert {"bash scripts/run-smollm2-135M.sh", "bash scripts/test.sh"} <= set(commands())


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


def lines_of_the_docs() -> list[str]:
    """Every `slime-spec ...` of the pages in docs/ that stands at the beginning of a line of code."""
    texts = [page.read_text(encoding="utf-8").replace("\\\n", " ") for page in sorted((ROOT / "docs").glob("*.md"))]
    found = [
        line.strip() for text in texts for line in re.findall(r"^(?: {4})?slime-spec .*", text, flags=re.MULTILINE)
    ]
    return sorted({line for line in found if "[" not in line and "..." not in line})


@pytest.mark.parametrize("line", lines_of_the_docs())
def test_a_command_of_the_docs_is_one_that_the_command_line_knows(line):
    command, *rest = shlex.split(line, comments=True)[1:]
    assert command in HANDLERS
    if command in ("train", "rollout", "config", "doctor"):
        read_arguments([word for word in rest if word != "--dry-run"])


@pytest.mark.real_model
@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_runs(command, tmp_path):
    done = subprocess.run(
        ["bash", "-c", reduced(command, tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=570,
        env={**os.environ, "SLIME_SPEC_VENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
