"""The run folder: complete, honest about versions, and never overwriting another run."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import pytest

from slime_spec.config.tree import Config, RunConfig
from slime_spec.errors import ConfigError
from slime_spec.folder_lock import FolderLock
from slime_spec.metrics.wandb import read_id
from slime_spec.run_folder import RunFolder, git_state
from slime_spec.run_log import RunLog


def config(folder: Path) -> Config:
    return Config(run=RunConfig(output_dir=str(folder)))


def ended(config: Config, argv: list[str], config_yaml: str, load: str | None = None) -> RunFolder:
    """The folder of a run that has ended."""
    with RunFolder.create(config, argv, config_yaml, load) as folder:
        return folder


def write_steps(path: Path, *steps: object, key: str = "step") -> None:
    path.write_text("".join(json.dumps({key: step, "n": number}) + "\n" for number, step in enumerate(steps)))


def steps_in(path: Path, key: str = "step") -> list[object]:
    return [json.loads(line)[key] for line in path.read_text().splitlines()]


def test_a_run_folder_says_what_was_run_with_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my work").mkdir()
    monkeypatch.chdir(tmp_path / "my work")
    folder = ended(config(tmp_path / "out"), ["echo", "--task", "a b", "$HOME"], "run:\n  seed: 0\n")
    assert folder.config_yaml.read_text() == "run:\n  seed: 0\n"
    said = subprocess.run(["bash", str(folder.path / "command.txt")], capture_output=True, text=True, check=True)
    assert said.stdout == "--task a b $HOME\n", "the command can be given again"
    assert f"cd '{tmp_path}/my work'\n" in (folder.path / "command.txt").read_text()
    told = json.loads((folder.path / "versions.json").read_text())
    assert told["packages"]["torch"] == version("torch")
    assert told["python"].startswith("3.")


def test_without_an_output_dir_the_folder_is_named_after_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended(Config(run=RunConfig(name="night")), ["x"], "a: 1\n")
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
        folder = ended(config(tmp_path), ["x"], "a: 1\n")
        folder.begin_at(0)
        assert not folder.metrics.exists()
        write_steps(folder.metrics, run)
    assert [steps_in(tmp_path / f"metrics{name}.jsonl") for name in (".1", ".2", "")] == [[0], [1], [2]]


def test_a_folder_of_another_configuration_is_refused_and_left_alone(tmp_path: Path) -> None:
    write_steps(ended(config(tmp_path), ["x"], "a: 1\n").metrics, 0)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"another configuration.*--run-name"):
        ended(config(tmp_path), ["x"], "a: 2\n")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("left", ["", "half a row"])
def test_a_folder_whose_run_finished_no_step_takes_the_corrected_command(left: str, tmp_path: Path) -> None:
    """Case reports/06."""
    ended(config(tmp_path), ["x"], "a: 1\n").metrics.write_text(left)
    folder = ended(config(tmp_path), ["x"], "a: 2\n")
    assert folder.config_yaml.read_text() == "a: 2\n"
    assert (tmp_path / "config.1.yaml").read_text() == "a: 1\n"


def test_a_resuming_run_goes_on_in_the_folder_and_keeps_the_earlier_configuration_beside_its_own(
    tmp_path: Path,
) -> None:
    write_steps(ended(config(tmp_path), ["x"], "a: 1\n").metrics, 0, 1, 2)
    folder = ended(config(tmp_path), ["x"], "a: 2\n", load="checkpoints")
    folder.begin_at(3)
    assert steps_in(folder.metrics) == [0, 1, 2]
    assert folder.config_yaml.read_text() == "a: 2\n"
    assert (tmp_path / "config.1.yaml").read_text() == "a: 1\n"
    assert not (tmp_path / "metrics.1.jsonl").exists()


def test_rows_past_the_checkpoint_are_set_aside_and_no_line_is_lost(tmp_path: Path) -> None:
    """Case reports/10: rows that an earlier version doubled, a line that is none, and one that was not finished."""
    folder = ended(config(tmp_path), ["x"], "a: 1\n")
    write_steps(folder.metrics, 0, 1, 2, 3, 2, 1, 4)
    with folder.metrics.open("ab") as file:
        file.write(b'\xff\n[]\n{"step": 1')
    write_steps(folder.samples, 0, 0, 1, 1, 2, 2, key="rollout_id")
    (tmp_path / "wandb_id.txt").write_text("abc\n")
    before = sorted(folder.metrics.read_bytes().splitlines())
    folder.begin_at(2)
    assert steps_in(folder.metrics) == [0, 1, 1]
    assert steps_in(folder.samples, "rollout_id") == [0, 0, 1, 1]
    assert steps_in(tmp_path / "samples.1.jsonl", "rollout_id") == [2, 2]
    aside = (tmp_path / "metrics.1.jsonl").read_bytes().splitlines()
    assert sorted([*folder.metrics.read_bytes().splitlines(), *aside]) == before
    assert read_id(tmp_path / "wandb_id.txt") == ("abc", 6), "as many steps, at most, does wandb have already"


def test_a_run_that_resumes_where_its_rows_end_goes_on_in_its_wandb_run(tmp_path: Path) -> None:
    folder = ended(config(tmp_path), ["x"], "a: 1\n")
    write_steps(folder.metrics, 0, 1)
    (tmp_path / "wandb_id.txt").write_text("abc\n")
    folder.begin_at(2)
    assert (tmp_path / "wandb_id.txt").exists()


def test_a_run_that_starts_anew_begins_a_wandb_run_of_its_own(tmp_path: Path) -> None:
    folder = ended(config(tmp_path), ["x"], "a: 1\n")
    write_steps(folder.metrics, 0, 1)
    (tmp_path / "wandb_id.txt").write_text("abc\n")
    folder.begin_at(0)
    assert (tmp_path / "wandb_id.1.txt").read_text() == "abc\n"
    assert not (tmp_path / "wandb_id.txt").exists()


def test_a_folder_that_is_no_run_and_a_path_that_is_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="must be empty, or hold a run"):
        ended(config(tmp_path), ["x"], "a: 1\n")
    with pytest.raises(ConfigError, match="must be a folder"):
        ended(config(tmp_path / "notes.txt"), ["x"], "a: 1\n")
    with pytest.raises(ConfigError, match="must be a folder that can be written: Not a directory"):
        ended(config(tmp_path / "notes.txt" / "run"), ["x"], "a: 1\n")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_second_run_in_a_folder_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    """Case audit/71: the second of one configuration began the first one's files again."""
    holder = f"in use by pid {os.getpid()} on {socket.gethostname()}"
    save = str(tmp_path / "checkpoints")
    with RunFolder.create(config(tmp_path / "one"), ["x"], "a: 1\n", save=save):
        with pytest.raises(ConfigError, match=holder):
            RunFolder.create(config(tmp_path / "one"), ["x"], "a: 1\n")
        with pytest.raises(ConfigError, match=rf"trainer\.save: .*{holder}"):
            RunFolder.create(config(tmp_path / "two"), ["x"], "a: 1\n", save=save)
    ended(config(tmp_path / "one"), ["x"], "a: 1\n")
    RunFolder.create(config(tmp_path / "two"), ["x"], "a: 1\n", save=str(tmp_path / "two")).close()


def test_the_lock_of_a_killed_run_holds_nobody_up(tmp_path: Path) -> None:
    """Case audit/71: kill -9 leaves the lock's file, and no lock."""
    script = (
        "import sys, time; from pathlib import Path; from slime_spec.folder_lock import FolderLock\n"
        "lock = FolderLock(Path(sys.argv[1]), 'run.name'); print('locked', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match=f"in use by pid {process.pid} on "):
            FolderLock(tmp_path, "run.name")
        process.kill()
    FolderLock(tmp_path, "run.name").close()


def test_the_log_file_has_the_lines_before_the_folder_was_there_and_the_error_that_ended_the_run(
    tmp_path: Path,
) -> None:
    logger = logging.getLogger("slime_spec.some")
    with suppress(RuntimeError), RunLog() as log:
        logger.warning("early %d", 1)
        log.write_to(tmp_path / "run.log")
        # Not through the logger: pytest would report the line too, and its processes cannot send it to each other.
        logging.getLogger().handlers[-1].handle(logging.LogRecord(logger.name, 30, "", 0, "late \ud800", (), None))
        raise RuntimeError("the end")
    logger.warning("after")
    text = (tmp_path / "run.log").read_text()
    assert [line.split(" ", 2)[2] for line in text.splitlines()[:3]] == [
        "slime_spec.some early 1",
        "slime_spec.some late \\ud800",
        "slime_spec.run_log ended by an error: the end",
    ]
    assert "Traceback" in text
    assert "after" not in text


def test_a_log_file_on_a_full_disk_is_said_once_and_ends_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog() as log:
        log.write_to(Path("/dev/full"))
        for _ in range(3):
            logging.getLogger("slime_spec.some").warning("line")
    assert capsys.readouterr().err.count("/dev/full lacks lines: [Errno 28] No space left on device") == 1
