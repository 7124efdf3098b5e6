"""Whole runs whose engines are killed or stopped from outside: they end with the weights of a run without faults."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import launched
from tests.e2e.test_restarts import wait_for_rows

pytestmark = [pytest.mark.long, pytest.mark.proves("slime_spec", "rollout", "trainer_bridge", "conf")]

STEPS, RUN_S = 8, 300
ENGINES = (
    *("--rollout-num-engines", "2", "--rollout-num-cpus-per-engine", "1", "--speculative-algorithm", "LOOKUP"),
    *("--rollout-health-check-interval", "0.5", "--rollout-health-check-timeout", "10", "--save-samples"),
    *("--n-samples-per-prompt", "8", "--rollout-batch-size", "4", "--rollout-max-response-len", "32"),
)
Faults = Callable[[subprocess.Popen[str], Path], None]


def engines_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of a run's engines, in the order in which they started."""
    found = [each for each in psutil.Process(process.pid).children(recursive=True) if "EngineWorker" in name_of(each)]
    return sorted(found, key=lambda each: each.create_time())


def name_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def run(policy: Path, graded: tuple[str, ...], folder: Path, faults: Faults) -> str:
    """Run the job while ``faults`` happen to it; the digest of the weights that it exports."""
    with launched(policy, folder / "run", "--num-rollout", str(STEPS), *graded, *ENGINES) as process:
        faults(process, folder)
        text = process.communicate(timeout=RUN_S)[0]
    assert process.returncode == 0, text
    assert "Traceback" not in text, text
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert [row["sync/weight_version"] for row in rows] == list(range(1, STEPS + 1))
    samples = [json.loads(line) for line in (folder / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == STEPS * 32
    assert all(int(sample["meta_info"]["weight_version"]) == sample["rollout_id"] for sample in samples)
    return hashlib.sha256((folder / "run" / "hf" / "model.safetensors").read_bytes()).hexdigest()


def nothing(process: subprocess.Popen[str], folder: Path) -> None:
    pass


def kills(process: subprocess.Popen[str], folder: Path) -> None:
    """Both engines, one after the other, wherever they are; then one that was started in place of one of them."""
    for row, which in ((1, 0), (3, 0), (5, -1)):
        wait_for_rows(process, folder, row)
        os.kill(engines_of(process)[which].pid, signal.SIGKILL)


def stops(process: subprocess.Popen[str], folder: Path) -> None:
    """An engine hangs for good, and the other for less than it may."""
    wait_for_rows(process, folder, 2)
    first, second = engines_of(process)
    first.suspend()
    second.suspend()
    time.sleep(3)
    second.resume()
    first.wait(60)


@pytest.fixture(scope="module")
def undisturbed(policy: Path, graded: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> str:
    return run(policy, graded, tmp_path_factory.mktemp("undisturbed"), nothing)


@pytest.mark.parametrize("faults", [kills, stops])
def test_a_run_whose_engines_die_or_hang_goes_on_and_ends_with_the_same_weights(
    faults: Faults, undisturbed: str, policy: Path, graded: tuple[str, ...], tmp_path: Path
) -> None:
    assert run(policy, graded, tmp_path, faults) == undisturbed
