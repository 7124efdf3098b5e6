"""The run folder: complete, honest about versions, and never overwriting another run."""

from __future__ import annotations

import json
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from slime_spec.config.tree import Config, RunConfig, TrainerConfig
from slime_spec.errors import ConfigError
from slime_spec.run_folder import RunFolder, git_state


def config(folder: Path, load: str | None = None) -> Config:
    return Config(run=RunConfig(output_dir=str(folder)), trainer=TrainerConfig(load=load))


def test_a_run_folder_says_what_was_run_with_what(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path / "out"), ["slime-spec", "train", "--task", "a b"], "run:\n  seed: 0\n")
    assert folder.config_yaml.read_text() == "run:\n  seed: 0\n"
    assert (folder.path / "command.txt").read_text() == "slime-spec train --task 'a b'\n"
    told = json.loads((folder.path / "versions.json").read_text())
    assert told["packages"]["torch"] == version("torch")
    assert told["python"].startswith("3.")


def test_without_an_output_dir_the_folder_is_named_after_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    RunFolder.create(Config(run=RunConfig(name="night")), ["x"], "a: 1\n")
    assert (tmp_path / "runs" / "night" / "config.yaml").is_file()


def test_the_git_state_is_the_checkouts_own_and_null_outside_one(tmp_path: Path) -> None:
    def git(*command: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        done = subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    assert git_state(tmp_path) is None
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "one")
    assert git_state(tmp_path) == {"revision": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "file").write_text("2")
    assert git_state(tmp_path) == {"revision": git("rev-parse", "HEAD"), "dirty": True}
    (tmp_path / "inner").mkdir()
    assert git_state(tmp_path / "inner") is None, "installed inside somebody else's checkout is not a checkout"


def test_the_same_run_again_sets_the_earlier_logs_aside(tmp_path: Path) -> None:
    for run in range(3):
        folder = RunFolder.create(config(tmp_path), ["x"], "a: 1\n")
        assert not folder.metrics.exists()
        folder.metrics.write_text(f"run {run}")
    kept = [(tmp_path / name).read_text() for name in ("metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl")]
    assert kept == ["run 0", "run 1", "run 2"]


def test_a_folder_of_another_configuration_is_refused_and_left_alone(tmp_path: Path) -> None:
    RunFolder.create(config(tmp_path), ["x"], "a: 1\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"another configuration.*--run-name"):
        RunFolder.create(config(tmp_path), ["x"], "a: 2\n")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_resuming_run_goes_on_in_the_folder_and_keeps_the_earlier_configuration_beside_its_own(
    tmp_path: Path,
) -> None:
    RunFolder.create(config(tmp_path), ["x"], "a: 1\n").metrics.write_text("steps 0 to 4\n")
    folder = RunFolder.create(config(tmp_path, load="checkpoints"), ["x"], "a: 2\n")
    assert folder.metrics.read_text() == "steps 0 to 4\n"
    assert folder.config_yaml.read_text() == "a: 2\n"
    assert (tmp_path / "config.1.yaml").read_text() == "a: 1\n"


def test_a_folder_that_is_no_run_and_a_path_that_is_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="must be empty, or hold a run"):
        RunFolder.create(config(tmp_path), ["x"], "a: 1\n")
    with pytest.raises(ConfigError, match="must be a folder"):
        RunFolder.create(config(tmp_path / "notes.txt"), ["x"], "a: 1\n")
    with pytest.raises(ConfigError, match="must be a folder that can be written: Not a directory"):
        RunFolder.create(config(tmp_path / "notes.txt" / "run"), ["x"], "a: 1\n")
