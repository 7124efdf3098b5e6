"""The memory of a process tree."""

import subprocess
import sys
import time

import pytest

from slime_spec.bench.memory import TreeMemory, pss_bytes, tree_pss_bytes

MB = 1_000_000
# A parent and a forked child that both touch the same 100 MB, and the child 50 MB of its own.
TREE = """
import mmap, os, sys
shared = mmap.mmap(-1, 100_000_000)
shared.write(b"x" * 100_000_000)
if os.fork() == 0:
    shared.seek(0)
    own = (sum(shared.read(100_000_000)[:10]), bytearray(b"y" * 50_000_000))
    print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def tree():
    process = subprocess.Popen([sys.executable, "-c", TREE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.stdin.close()
    process.wait(timeout=30)


def test_a_tree_counts_its_children_and_shared_memory_once(tree) -> None:
    total = tree_pss_bytes(tree.pid)
    assert 150 * MB < total < 195 * MB  # counted twice, the shared part alone would be 200 MB
    assert pss_bytes(tree.pid) < 100 * MB


def test_the_sampler_keeps_the_peak(tree) -> None:
    with TreeMemory(tree.pid, interval_s=0.02) as memory:
        time.sleep(0.2)
        tree.stdin.close()
        tree.wait(timeout=30)
        time.sleep(0.1)
    assert memory.num_samples >= 3
    assert 150 * MB < memory.peak_bytes < 195 * MB
    assert tree_pss_bytes(tree.pid) == pss_bytes(tree.pid) == 0


def test_a_sampler_that_fails_does_not_end_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(pid: int) -> int:
        raise PermissionError(pid)

    monkeypatch.setattr("slime_spec.bench.memory.pss_bytes", denied)
    with pytest.raises(PermissionError), TreeMemory(1, interval_s=0.01):
        pass
