"""Packed weights lie in huge pages where the system grants them: a pass reads all of them, once.

With pages of 4 KiB every 4 KiB need a walk through the page tables, in a virtual machine through two of them: a pass
over one token took half its time more. Linux grants pages of 2 MiB to memory that asks for them (madvise).

    take(bytes)        memory from the slab at hand, or from another slab
    a slab's last use  gives it back: the system may have its pages (MADV_FREE), and what it has not taken by the next
                       push is written again without asking for new ones, which took 1.1 s for 0.5 GB
"""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress
from threading import Lock

import torch

HUGE_PAGE = 2 << 20
SLAB_BYTES = 32 << 20
ALIGNMENT = 64


class PackedMemory:
    """Hands out memory for as long as a tensor lies in it."""

    def __init__(self) -> None:
        self._lock = Lock()  # pushes pack on threads of their own
        self._free: list[mmap.mmap] = []  # slabs that nothing lies in
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        """Return ``num_bytes`` of memory as uint8; what was in it is unknown."""
        with self._lock:
            if self._used + num_bytes > self._slab.numel():
                self._slab, self._used = self._next_slab(max(SLAB_BYTES, num_bytes)), 0
            taken = self._slab[self._used : self._used + num_bytes]
            self._used += -(-num_bytes // ALIGNMENT) * ALIGNMENT
            return taken

    def _next_slab(self, num_bytes: int) -> torch.Tensor:
        """Return memory that begins with a huge page; nothing of a new slab is resident before it is written."""
        if not hasattr(mmap, "MADV_HUGEPAGE"):  # Linux alone has it
            return torch.empty(num_bytes, dtype=torch.uint8)
        size = -(-num_bytes // HUGE_PAGE) * HUGE_PAGE + HUGE_PAGE
        mapped = min((each for each in self._free if len(each) >= size), key=len, default=None)
        if mapped is None:
            mapped = _mapped(size)
        else:
            self._free.remove(mapped)
        view = memoryview(mapped)  # every tensor in the slab keeps it
        weakref.finalize(view, self._give_back, mapped).atexit = False
        whole = torch.frombuffer(view, dtype=torch.uint8)
        start = -whole.data_ptr() % HUGE_PAGE
        return whole[start : start + num_bytes]

    def _give_back(self, mapped: mmap.mmap) -> None:
        # Without the lock: the last tensor may go while this thread holds it.
        with suppress(OSError):  # of a kernel before 4.5
            mapped.madvise(mmap.MADV_FREE)
        self._free.append(mapped)


def _mapped(size: int) -> mmap.mmap:
    mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory gets no huge pages
    with suppress(OSError):  # of a kernel that was built without them
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped


PACKED_MEMORY = PackedMemory()


def placed(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a contiguous CPU tensor in packed memory."""
    copy = PACKED_MEMORY.take(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)
