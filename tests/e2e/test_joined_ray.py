"""A run joins somebody else's Ray, gives back what it took there, and leaves it running."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

# Prints its address; then, for every line it is sent, how many cores are free.
SOMEBODY_ELSES_RAY = """
import ray, sys
context = ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
print(context.address_info["gcs_address"], flush=True)
for _ in sys.stdin:
    print(ray.available_resources().get("CPU", 0.0), flush=True)
"""
FREED_WITHIN_S = 30


class RunningRay:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SOMEBODY_ELSES_RAY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "RAY_AUTH_MODE": "token"},
        )
        self.address = self._line()

    def free_cores(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("?\n")
        self.process.stdin.flush()
        return float(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        self.process.communicate(timeout=60)


@pytest.fixture
def running_ray() -> Iterator[RunningRay]:
    ray = RunningRay()
    yield ray
    ray.close()


def test_a_run_joins_a_running_ray_and_gives_back_what_it_took(running_ray, slime_spec, tmp_path):
    assert running_ray.free_cores() == 2.0
    slime_spec(
        "rollout",
        *("--ray-address", running_ray.address, "--rollout-engine", "fake", "--num-rollout", "1"),
        *("--output-dir", str(tmp_path / "run")),
    )
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 4
    deadline = time.monotonic() + FREED_WITHIN_S
    while running_ray.free_cores() != 2.0 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert running_ray.free_cores() == 2.0
