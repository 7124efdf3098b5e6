"""The command ``slime-spec``: what it prints, and how it ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

import slime_spec
from slime_spec.bench import BENCHES
from slime_spec.config.build import to_yaml
from slime_spec.config.schema import settings
from slime_spec.launch import cli
from slime_spec.launch.cli import main
from slime_spec.launch.compose import compose
from slime_spec.launch.groups import GROUPS, choices
from slime_spec.launch.help import COMMANDS

Capture = pytest.CaptureFixture[str]


def test_config_prints_the_resolved_configuration(capsys: Capture) -> None:
    assert main(["config", "--config", "tiny", "--lr", "1e-6"]) == 0
    assert capsys.readouterr().out == to_yaml(compose(["experiment=tiny", "trainer.lr=1e-6"]))


def test_a_mistake_is_one_block_on_stderr_and_exit_code_2(capsys: Capture) -> None:
    assert main(["train", "--lrr", "1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0] == "error: --lrr"
    assert [line.split(":")[0].strip() for line in lines] == ["error", "rule", "value", "remedy"]
    assert "Did you mean --lr?" in lines[3]


def test_no_command_or_an_unknown_one_lists_the_commands(capsys: Capture) -> None:
    assert main([]) == 2
    assert "slime-spec rollout" in capsys.readouterr().out
    assert main(["trian"]) == 2
    error = capsys.readouterr().err
    assert "Did you mean train?" in error
    assert "slime-spec models fetch" in error
    assert main(["--help"]) == 0


def test_the_help_of_train_shows_every_flag_with_its_default_and_names_sglangs(capsys: Capture) -> None:
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for path, setting in settings().items():
        assert ", ".join(setting.flags) in text
        assert f"{path}=" in text
        assert setting.help.split()[-1] in text
    for group in GROUPS:
        assert all(name in text for name in choices(group))
        assert f"{group}=" in text
    assert "--sglang-<flag>" in text
    assert "ServerArgs flags of SGLang 0.5.21" in text


def test_rollout_is_train_without_a_trainer(capsys: Capture) -> None:
    assert main(["rollout", "--debug-train-only"]) == 2
    assert "--debug-rollout-only and --debug-train-only" in capsys.readouterr().err


def test_a_bench_without_a_name_says_which(capsys: Capture) -> None:
    assert main(["bench"]) == 2
    assert "bench main-job" in capsys.readouterr().err


def test_every_benchmark_is_named_where_a_newcomer_looks(capsys: Capture) -> None:
    assert main(["bench", "--help"]) == 0
    asked = capsys.readouterr().out
    assert main(["bench"]) == 2
    refused = capsys.readouterr().err
    assert BENCHES
    for name in BENCHES:
        assert name in asked
        assert f"bench {name}" in refused
        assert name in next(line for line in COMMANDS.splitlines() if "slime-spec bench" in line)


def test_each_action_that_the_help_of_draft_lists_has_a_help_of_its_own(capsys: Capture) -> None:
    assert main(["draft", "--help"]) == 0
    listed = [line.split()[2] for line in capsys.readouterr().out.splitlines() if line.startswith("  slime-spec draft")]
    assert listed == ["train", "eval", "convert"]
    for action in listed:
        with pytest.raises(SystemExit) as ended:
            main(["draft", action, "--help"])
        assert ended.value.code == 0
        assert f"usage: slime-spec draft {action}" in capsys.readouterr().out


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "slime_spec", "config", "--sp_type", "deterministic"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert 'algorithm: "LOOKUP"' in done.stdout


def test_help_ends_quietly_when_its_reader_stops_early() -> None:
    command = f"{sys.executable} -m slime_spec train --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("slime-spec train")
    assert done.stderr == ""


def test_ctrl_c_ends_any_command_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "HANDLERS", {"doctor": interrupted})
    assert main(["doctor"]) == 130


def test_the_version_is_the_packages_own(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"slime_spec {slime_spec.__version__}\n"
