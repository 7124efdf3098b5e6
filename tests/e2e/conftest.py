"""Whole runs of the command line on a tiny policy, each in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.tiny_policy import make_tiny_policy

RUN_TIMEOUT_S = 240
ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session")
def graded(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Prompts with a reward that differs between a random policy's replies, so that training has something to do."""
    data = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    data.write_text("".join(f'{{"prompt": "say {i}", "label": "{i}"}}\n' for i in range(6)))
    return ("--prompt-data", str(data), "--custom-rm-path", "tests.support.rewards:variety")


@pytest.fixture(scope="session")
def slime_spec(policy: Path) -> Run:
    """Run ``slime-spec COMMAND --config tiny ...`` on the tiny policy; its output is shown when it fails."""

    def run(command: str, *arguments: str, expect: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "slime_spec",
                command,
                "--config",
                "tiny",
                "--hf-checkpoint",
                str(policy),
                *arguments,
            ],
            capture_output=True,
            text=True,
            timeout=RUN_TIMEOUT_S,
            cwd=ROOT,
            env={**os.environ, "WANDB_MODE": "offline", **env},
        )
        assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@contextmanager
def launched(policy: Path, folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A training run of the tiny job in a process group of its own, as in a terminal; killed where it has not ended."""
    words = ["train", "--config", "tiny", "--hf-checkpoint", str(policy), "--output-dir", str(folder), *arguments]
    with subprocess.Popen(
        [sys.executable, "-m", "slime_spec", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()
