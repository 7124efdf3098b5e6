"""A run that is killed, interrupted or preempted goes on with the command that started it."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from ray.exceptions import RayError

from rollout.pool import EngineProcessDied
from slime_spec.config.tree import Config, RunConfig, TrainerConfig
from slime_spec.errors import CheckpointError
from slime_spec.interfaces import RunState
from slime_spec.launch import train
from slime_spec.launch.preflight import checkpoint_to_load
from slime_spec.rl.loop import Job
from slime_spec.stop import StopSignals
from tests.e2e.conftest import launched
from trainer_bridge.checkpoint_folder import begin_checkpoint, publish_checkpoint, resolve_checkpoint, saved_step

START_S = 240
NUM_STEPS = 100_000  # it never gets there


def write_checkpoint(root: Path, name: str) -> None:
    (begin_checkpoint(root, name) / "metadata.json").write_text("{}")
    publish_checkpoint(root, name)


@pytest.mark.parametrize("save", [None, "elsewhere"])
def test_a_run_that_loads_from_where_it_saves_starts_anew_while_nothing_is_saved(
    save: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case reports/06."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / (save or "run/checkpoints")
    load = f"{folder}/../{folder.name}"
    asked = Config(run=RunConfig(output_dir="run"), trainer=TrainerConfig(load=load, save=save, save_interval=1))
    assert checkpoint_to_load(asked) is None
    folder.mkdir(parents=True)
    assert checkpoint_to_load(asked) is None
    write_checkpoint(folder, "step-000003")
    assert checkpoint_to_load(asked) == load


def test_a_run_that_loads_from_elsewhere_is_refused_while_nothing_is_there(tmp_path: Path) -> None:
    """Case reports/06."""
    for trainer in (
        TrainerConfig(load=str(tmp_path)),
        TrainerConfig(load=str(tmp_path), save=str(tmp_path / "other")),
    ):
        with pytest.raises(CheckpointError, match=f"must be a checkpoint.*{tmp_path}"):
            checkpoint_to_load(Config(trainer=trainer))


def finish_job(stop: StopSignals) -> Job:
    return Job(Config(), *(None,) * 7, stop)  # type: ignore[arg-type]


LOST = [RayError("lost"), EngineProcessDied("lost")]


@pytest.mark.parametrize("error", LOST)
@pytest.mark.parametrize("is_exporting", [False, True])
def test_a_signal_that_ended_the_runs_processes_too_ends_it_in_order(
    error: Exception, is_exporting: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a scheduler's, which goes to every process of a job."""
    state, stop = RunState(3, 24, 3), StopSignals()

    def lost(*_: object) -> RunState:
        raise error

    def lost_by_a_signal(*_: object) -> RunState:
        stop.ask(signal.SIGTERM)
        raise error

    def run(loop_or_export: Callable[..., RunState]) -> None:
        monkeypatch.setattr(train, "run_loop", (lambda *_: state) if is_exporting else loop_or_export)
        train.finish(finish_job(stop), state, loop_or_export if is_exporting else pytest.fail)

    with pytest.raises(type(error)):
        run(lost)
    run(lost_by_a_signal)
    assert "before they had saved and exported: lost" in caplog.text


@pytest.mark.parametrize(("at", "expected"), [("loop", ["loop"]), ("export", ["loop", "export 5"])])
def test_a_signal_in_the_loop_leaves_the_export_out_and_one_in_the_export_lets_it_be_written(
    at: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, events = StopSignals(), list[str]()

    def loop(job: Job, state: RunState) -> RunState:
        events.append("loop")
        if at == "loop":
            stop.ask(signal.SIGTERM)
        return RunState(5, 40, 5)

    def export(state: RunState) -> None:
        if at == "export":
            stop.ask(signal.SIGTERM)
        events.append(f"export {state.rollout_id}")

    monkeypatch.setattr(train, "run_loop", loop)
    train.finish(finish_job(stop), RunState(3, 24, 3), export)
    assert events == expected
    assert stop.exit_code == 143


def num_rows(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def started(policy: Path, folder: Path, graded: tuple[str, ...]) -> AbstractContextManager[subprocess.Popen[str]]:
    """The one command of every start of a run."""
    saves = ("--save", str(folder / "ck"), "--load", str(folder / "ck"), "--save-interval", "2", "--save-samples")
    return launched(policy, folder / "run", *graded, *saves, "--num-rollout", str(NUM_STEPS))


def wait_for_rows(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    end = time.monotonic() + START_S
    while num_rows(folder / "run" / "metrics.jsonl") < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"row {count} did not come in {START_S} s"
        time.sleep(0.02)


def ended(process: subprocess.Popen[str], code: int, folder: Path) -> int:
    """Wait for the end in order; return the step at which the output says that the run can be resumed."""
    text = process.communicate(timeout=START_S)[0]
    assert process.returncode == code, text
    assert "Traceback" not in text
    name = signal.Signals(code - 128).name
    words = " ".join(text.split())  # whatever the terminal's width
    said = re.search(rf"stopped by {name}: step (\d+) of {NUM_STEPS} is saved, resume with --load (\S+)", words)
    assert said is not None, text
    assert said[2] == str(folder / "ck")
    return int(said[1])


@pytest.mark.long
def test_one_command_is_the_first_start_and_every_restart(
    policy: Path, graded: tuple[str, ...], tmp_path: Path
) -> None:
    """Cases reports/06, reports/10: killed, interrupted in a terminal, preempted."""
    run = tmp_path / "run"
    with started(policy, tmp_path, graded) as process:
        wait_for_rows(process, tmp_path, 5)
        process.kill()
        process.communicate()
    reached = num_rows(run / "metrics.jsonl")
    with started(policy, tmp_path, graded) as process:
        wait_for_rows(process, tmp_path, reached + 2)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
        reached = ended(process, 130, tmp_path)
    assert num_rows(run / "metrics.jsonl") == reached
    with started(policy, tmp_path, graded) as process:
        wait_for_rows(process, tmp_path, reached + 2)
        process.terminate()
        reached = ended(process, 143, tmp_path)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(reached))
    assert saved_step(resolve_checkpoint(str(tmp_path / "ck"))) == reached
    assert all(row["sync/weight_version"] == row["step"] + 1 for row in rows if "sync/weight_version" in row)
    samples = [json.loads(line)["rollout_id"] for line in (run / "samples.jsonl").read_text().splitlines()]
    assert samples == [step for step in range(reached) for _ in range(4)]
    assert not (run / "hf").exists()
    assert (run / "run.log").read_text().count("run folder made") == 3
