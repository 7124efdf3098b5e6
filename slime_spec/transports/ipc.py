"""IpcTransport lends every bucket to the engines: they map the memory of the trainer's rank, and no byte passes a host.

    rank:     | slot 0 | slot 1 |      buckets 0, 1, 2, … in turn, in the engines' dtype
                   ▲        ▲
    engines:   mapped once a push; an engine copies what it needs of a bucket before it answers

On a GPU a slot is device memory, which CUDA IPC opens in another process on the same GPU; on a CPU it is a memory file,
which another process on the same machine opens through /proc. Either is gone when the processes are. A bucket may take
the slot of the bucket before the last, whose answers are there: whoever sends a push makes at most one bucket ahead.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from slime_spec.errors import PushError
from slime_spec.transports.packed import layout, pack, unpacked
from slime_spec.transports.read_only import read_only
from slime_spec.transports.torch_handles import DEVICE_ARGUMENT, gpu_of
from slime_spec.weights.messages import NamedTensors, Opening, PushBucket

NUM_SLOTS = 2
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class SlotHandle(Protocol):
    """Says where a slot is."""

    def is_here(self) -> bool:
        """Return whether this process can map the slot: it is on the same machine, or on the same GPU."""

    def map(self) -> torch.Tensor:
        """Return the slot's memory as flat uint8."""


@dataclass(frozen=True)
class HostSlotHandle:
    """Names a memory file by the process that holds it open."""

    machine: str
    process: int
    file: int
    num_bytes: int

    def is_here(self) -> bool:
        return self.machine == _machine()

    def map(self) -> torch.Tensor:
        descriptor = os.open(f"/proc/{self.process}/fd/{self.file}", os.O_RDONLY)
        try:
            return read_only(mmap.mmap(descriptor, self.num_bytes, prot=mmap.PROT_READ))
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class DeviceSlotHandle:
    """Names device memory by its GPU and by what torch needs to open it in another process."""

    gpu: str
    arguments: tuple[Any, ...]

    def is_here(self) -> bool:
        return torch.cuda.is_available() and self.gpu == gpu_of(torch.cuda.current_device())

    def map(self) -> torch.Tensor:
        # The same GPU may have another number in each process.
        arguments = list(self.arguments)
        arguments[DEVICE_ARGUMENT] = torch.cuda.current_device()
        memory: torch.Tensor = rebuild_cuda_tensor(*arguments)
        return memory


class HostSlot:
    """Owns a memory file."""

    def __init__(self, num_bytes: int) -> None:
        self._file = os.memfd_create("slime_spec-push")
        os.ftruncate(self._file, num_bytes)
        self.memory = torch.frombuffer(mmap.mmap(self._file, num_bytes), dtype=torch.uint8)
        self.handle = HostSlotHandle(_machine(), os.getpid(), self._file, num_bytes)

    def close(self) -> None:
        os.close(self._file)


class DeviceSlot:
    """Owns device memory; torch keeps it until no process has it mapped."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        _, arguments = reduce_tensor(self.memory)
        self.handle = DeviceSlotHandle(gpu_of(self.memory.get_device()), arguments)

    def close(self) -> None:
        del self.memory


@dataclass(frozen=True)
class Lent:
    """Says where a bucket's tensors begin in a slot."""

    slot: SlotHandle
    starts: tuple[int, ...]


class IpcTransport:
    """Implements WeightTransport as the module says."""

    lends = True

    def __init__(self) -> None:
        self._slots: list[HostSlot | DeviceSlot | None] = [None] * NUM_SLOTS
        self._turn = 0
        self._mapped: dict[SlotHandle, torch.Tensor] = {}

    def open(self, host: str, opening: Opening) -> None:
        pass

    def publish(self, named: NamedTensors) -> tuple[Lent, ...]:
        tensors = [tensor for _, tensor in named]
        starts, num_bytes = layout(tensors)
        slot = self._slot(num_bytes, tensors[0].device)
        pack(tensors, starts, slot.memory)
        _settle(slot.memory.device)
        return (Lent(slot.handle, starts),)

    def join(self, routes: Sequence[None], place: int) -> None:
        pass

    def receive(self, bucket: PushBucket) -> list[torch.Tensor]:
        lent = next((each for each in bucket.handle if each.slot.is_here()), None)
        if lent is None:
            raise PushError(f"no rank of the trainer is where this engine is: bucket {bucket.index} is not here")
        if lent.slot not in self._mapped:
            try:
                self._mapped[lent.slot] = lent.slot.map()
            except (OSError, RuntimeError, ValueError) as error:
                raise PushError(f"bucket {bucket.index} is out of reach: {error}") from error
        return unpacked(self._mapped[lent.slot], lent.starts, bucket.tensors)

    def release(self) -> None:
        for memory in self._mapped.values():
            _settle(memory.device)

    def close(self) -> None:
        self._mapped.clear()
        for slot in self._slots:
            if slot is not None:
                slot.close()
        self._slots = [None] * NUM_SLOTS

    def _slot(self, num_bytes: int, device: torch.device) -> HostSlot | DeviceSlot:
        """Return the slot whose turn it is, made anew where it is too small."""
        self._turn = (self._turn + 1) % NUM_SLOTS
        slot = self._slots[self._turn]
        if slot is None or len(slot.memory) < num_bytes:
            if slot is not None:
                slot.close()
            slot = HostSlot(num_bytes) if device.type == "cpu" else DeviceSlot(num_bytes, device)
            self._slots[self._turn] = slot
        return slot


def _settle(device: torch.device) -> None:
    """Wait until a GPU has done what was queued: the other process does not see its queue."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@cache
def _machine() -> str:
    return BOOT_ID.read_text().strip()
