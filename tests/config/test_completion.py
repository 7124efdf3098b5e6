"""The shell completes commands, flags and their choices by the script that the command prints."""

from __future__ import annotations

import re
import subprocess

import pytest

from slime_spec.config.schema import settings
from slime_spec.launch.cli import HANDLERS, main
from slime_spec.launch.flags import flags
from slime_spec.launch.groups import choices

Capture = pytest.CaptureFixture[str]


def completed(script: str, *words: str) -> list[str]:
    """What bash offers at the end of a command line."""
    line = " ".join(f"'{word}'" for word in ("slime-spec", *words))
    ask = f'{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words)}; _slime_spec; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands_flags_and_choices(capsys: Capture) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert set(completed(script, "")) == {*HANDLERS, "--help"}
    assert completed(script, "tra") == ["train"]
    assert set(completed(script, "train", "--")) == {*flags(), "--dry-run"}
    assert completed(script, "config", "--rollout-batch") == ["--rollout-batch-size"]
    assert completed(script, "train", "--lr", "1", "--config", "smol") == [
        name for name in choices("experiment") if name.startswith("smol")
    ]
    assert completed(script, "train", "--rollout-engine", "") == list(settings()["rollout.engine"].choices)
    assert completed(script, "train", "--hf-checkpoint", "mod") == []  # files are the shell's own
    assert completed(script, "serve", "--po") == []
    assert completed(script, "draft", "") == ["train", "eval", "convert"]
    assert completed(script, "models", "f") == ["fetch"]
    assert "fa3" in completed(script, "train", "--sglang-attention-backend", "fa")


def test_zsh_reads_the_same_by_its_own_bridge(capsys: Capture) -> None:
    main(["completion", "bash"])
    of_bash = capsys.readouterr().out
    main(["completion", "zsh"])
    of_zsh = capsys.readouterr().out
    assert of_zsh.endswith(of_bash)
    assert "bashcompinit" in of_zsh.removesuffix(of_bash)


def test_an_unknown_shell_is_refused_and_help_says_where_the_script_goes(capsys: Capture) -> None:
    assert main(["completion", "fish"]) == 2
    assert "must be one of bash, zsh" in capsys.readouterr().err
    assert main(["completion"]) == 0
    assert "~/.bashrc" in capsys.readouterr().out


def test_the_help_of_rollout_names_it(capsys: Capture) -> None:
    assert main(["rollout", "--help"]) == 0
    assert capsys.readouterr().out.startswith("slime-spec rollout ")


def test_the_help_of_config_is_its_own(capsys: Capture) -> None:
    assert main(["config", "--lr", "1", "--help"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("slime-spec config")
    assert len(told.splitlines()) < 20
    examples = [line.strip() for line in told.splitlines() if line.startswith("  slime-spec config")]
    assert len(examples) == 2
    for example in examples:
        assert main(re.split(r" > |    ", example)[0].split()[1:]) == 0
