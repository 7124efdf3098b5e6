"""Sample the memory of a process and of all its descendants while the process runs."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import TracebackType

import psutil


def pss_bytes(pid: int) -> int:
    """Return the proportional set size: a page shared by n processes counts 1/n in each; 0 for an ended process."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    # A process that ends while its file is read gives an empty or incomplete text.
    sizes_kb = [int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")]
    return 1024 * sum(sizes_kb)


def tree_pss_bytes(root_pid: int) -> int:
    """Return the memory of the process and all its descendants, shared memory counted once."""
    try:
        root = psutil.Process(root_pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    return sum(pss_bytes(process.pid) for process in processes)


class TreeMemory:
    """Samples a process tree until the context is left, from a thread of its own. Example::

    with TreeMemory(process.pid) as memory:
        process.wait()
    memory.peak_bytes
    """

    def __init__(self, root_pid: int, interval_s: float = 1.0) -> None:
        self._root_pid, self._interval_s = root_pid, interval_s
        self._done = Event()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tree-memory")
        self.peak_bytes = self.num_samples = 0

    def __enter__(self) -> TreeMemory:
        self._sampling: Future[None] = self._executor.submit(self._sample)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        self._executor.shutdown(wait=True)
        self._sampling.result()

    def _sample(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, tree_pss_bytes(self._root_pid))
            self.num_samples += 1
            if self._done.wait(self._interval_s):
                return
