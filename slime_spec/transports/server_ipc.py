"""ServerIpcTransport lends every bucket to the servers on the same GPU: only handles come through the engine.

    rank:     | slot 0 | slot 1 |      buckets 0, 1, 2, … in turn
                   ▲        ▲
    server:    each tensor-parallel rank maps the slot of the trainer's rank on its GPU, loads it, and lets it go

On a CPU the slots are in shared memory, which any process of the machine maps. A bucket may take the slot of the bucket
before the last, whose answers are there: whoever sends a push makes at most one bucket ahead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slime_spec.transports.packed import layout, pack, unpacked
from slime_spec.transports.to_servers import ServerRoute, ToServers
from slime_spec.transports.torch_handles import handles_of, share_by_file
from slime_spec.weights.messages import NamedTensors, Opening, meta_of

NUM_SLOTS = 2


@dataclass(frozen=True)
class Handles:
    """Has the handles of a bucket's tensors in one rank's memory, as servers take them: a text for each that reads it.

    torch counts readers: handles that two processes have read are let go too early.
    """

    texts: tuple[str, ...]


class ServerIpcTransport(ToServers):
    """Implements WeightTransport as the module says."""

    def __init__(self, ranks_per_server: int) -> None:
        super().__init__(ranks_per_server)
        self._slots: list[torch.Tensor | None] = [None] * NUM_SLOTS
        self._turn = 0
        self._num_readers = 1  # the server's rank on the same GPU

    def open(self, host: str, opening: Opening) -> ServerRoute:
        if not torch.cuda.is_available():
            self._num_readers = len(opening.receivers) * self.ranks_per_server
        return ServerRoute(self.kept.begin(opening), self.kept)

    def close(self) -> None:
        self._slots = [None] * NUM_SLOTS

    def _send(self, named: NamedTensors) -> Handles:
        tensors = [tensor for _, tensor in named]
        starts, num_bytes = layout(tensors)
        slot = self._slot(num_bytes, tensors[0].device)
        pack(tensors, starts, slot)
        if slot.is_cuda:
            torch.cuda.current_stream(slot.device).synchronize()  # another process does not see this queue
        lent = unpacked(slot, starts, [meta_of(name, tensor) for name, tensor in named])
        views = [(name, view) for (name, _), view in zip(named, lent, strict=True)]
        return Handles(tuple(handles_of(views) for _ in range(self._num_readers)))

    def _slot(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """Return the slot whose turn it is, made anew where it is too small."""
        self._turn = (self._turn + 1) % NUM_SLOTS
        slot = self._slots[self._turn]
        if slot is None or len(slot) < num_bytes:
            slot = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            if device.type == "cpu":
                share_by_file()
                slot.share_memory_()
            self._slots[self._turn] = slot
        return slot
