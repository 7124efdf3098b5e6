"""A run that is killed, interrupted or preempted goes on with the command that started it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
from trainer_bridge.checkpoint_folder import begin_checkpoint, publish_checkpoint

ROOT = Path(__file__).resolve().parents[2]
START_S = 240
NUM_STEPS = 20


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


@pytest.mark.parametrize("error", [RayError("lost"), EngineProcessDied("lost")])
def test_a_signal_that_ended_the_runs_processes_too_ends_it_in_order(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a scheduler's, which goes to every process of a job."""
    state = RunState(3, 24, 3)
    stop = StopSignals()
    job = Job(Config(), *(None,) * 7, stop)  # type: ignore[arg-type]

    def lost(job: Job, state: RunState) -> RunState:
        raise error

    monkeypatch.setattr(train, "run_loop", lost)
    with pytest.raises(type(error)):
        train.loop_or_stop(job, state)
    stop.ask(signal.SIGTERM)
    assert train.loop_or_stop(job, state) == state
    assert "before the last step was saved: lost" in caplog.text


def num_rows(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@contextmanager
def started(policy: Path, folder: Path, graded: tuple[str, ...]) -> Iterator[subprocess.Popen[str]]:
    """The one command of a run, in a process group of its own, as in a terminal."""
    words = ["train", "--config", "tiny", "--hf-checkpoint", str(policy), "--output-dir", str(folder / "run")]
    words += ["--save", str(folder / "ck"), "--load", str(folder / "ck"), "--save-interval", "2", "--save-samples"]
    with subprocess.Popen(
        [sys.executable, "-m", "slime_spec", *words, "--num-rollout", str(NUM_STEPS), *graded],
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


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    end = time.monotonic() + START_S
    while num_rows(folder / "run" / "metrics.jsonl") <= step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"step {step} did not come in {START_S} s"
        time.sleep(0.02)


def ended(process: subprocess.Popen[str], code: int) -> str:
    text = process.communicate(timeout=START_S)[0]
    assert process.returncode == code, text
    assert "Traceback" not in text
    return text


@pytest.mark.long
def test_one_command_is_the_first_start_and_every_restart(
    policy: Path, graded: tuple[str, ...], tmp_path: Path
) -> None:
    """Cases reports/06, reports/10, audit/71: killed, interrupted, preempted, finished, and started once more."""
    run = tmp_path / "run"
    with started(policy, tmp_path, graded) as first:
        wait_for_step(first, tmp_path, 4)
        first.send_signal(signal.SIGSTOP)  # it would have finished before the second got there
        with started(policy, tmp_path, graded) as second:
            assert f"in use by pid {first.pid} on " in ended(second, 2)
        first.kill()
        first.communicate()
    reached = num_rows(run / "metrics.jsonl")
    with started(policy, tmp_path, graded) as process:
        wait_for_step(process, tmp_path, reached + 2)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
        assert "stopped by SIGINT: step " in ended(process, 130)
    reached = num_rows(run / "metrics.jsonl")
    with started(policy, tmp_path, graded) as process:
        wait_for_step(process, tmp_path, reached + 2)
        process.terminate()
        assert f"is saved, resume with --load {tmp_path / 'ck'}" in ended(process, 143)
    with started(policy, tmp_path, graded) as process:
        assert f"finished step={NUM_STEPS}/{NUM_STEPS}" in ended(process, 0)
    with started(policy, tmp_path, graded) as process:
        assert f"nothing to do: the checkpoint is at step {NUM_STEPS} of {NUM_STEPS}" in ended(process, 0)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(NUM_STEPS))
    assert all(row["sync/weight_version"] == row["step"] + 1 for row in rows if "sync/weight_version" in row)
    samples = [json.loads(line)["rollout_id"] for line in (run / "samples.jsonl").read_text().splitlines()]
    assert samples == [step for step in range(NUM_STEPS) for _ in range(4)]
    assert (run / "hf" / "model.safetensors").exists()
    assert (run / "run.log").read_text().count("run folder made") == 5
