"""A trainer's rank keeps a copy of what it sends straight to servers, which load in place and can give nothing back.

A server that replaces another gets its weights from this copy, and a push is verified against it. Nobody waits for the
copy in a push: it is made on the device's own queue, into pinned host memory, beside the broadcast.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol
from uuid import uuid4

import torch

from slime_spec.errors import PushError
from slime_spec.weights.checksums import as_bytes
from slime_spec.weights.messages import NamedTensors, Opening, Side, TensorMeta, meta_of

NUM_KEPT = 2  # pushes of the same tensors: the last that every engine took, and a push in progress


class Source(Protocol):
    """Gives out what a rank keeps; an engine asks it for a push that the rank has named."""

    def fetch(self, push: str, names: Sequence[str], num_rows: int | None) -> dict[str, torch.Tensor]:
        """Return those of the tensors that the rank has, whole or their first rows.

        Raises PushError where the rank no longer keeps the push.
        """


Packed = dict[str, tuple[TensorMeta, torch.Tensor]]


def packed_for_ray(tensors: Mapping[str, torch.Tensor]) -> Packed:
    """Return tensors as bytes and what they are: torch cannot unpickle tensors in fp8."""
    return {name: (meta_of(name, tensor), as_bytes(tensor)) for name, tensor in tensors.items()}


def unpacked_from_ray(packed: Packed) -> dict[str, torch.Tensor]:
    """Return the tensors that ``packed_for_ray`` has packed."""
    return {name: flat.view(meta.torch_dtype).view(meta.shape) for name, (meta, flat) in packed.items()}


class KeptWeights:
    """Implements Source in the rank's own process, and is filled there."""

    def __init__(self) -> None:
        self._pushes: dict[str, dict[str, torch.Tensor]] = {}
        self._names: dict[tuple[Side, int], str] = {}
        self._current = ""

    def begin(self, opening: Opening) -> str:
        """Begin to keep a push, and return its name: its earlier one, where the same weights were sent before.

        Of its side the oldest push of the same tensors is dropped, and one that was given up half-way.
        """
        of_push = opening.side, opening.version
        if of_push not in self._names:
            earlier = {name: self._pushes[name] for (side, _), name in self._names.items() if side == opening.side}
            dropped = _outdated(earlier)
            self._pushes = {name: kept for name, kept in self._pushes.items() if name not in dropped}
            self._names = {key: name for key, name in self._names.items() if name not in dropped}
            self._names[of_push] = uuid4().hex
            self._pushes[self._names[of_push]] = {}
        self._current = self._names[of_push]
        return self._current

    def add(self, named: NamedTensors) -> None:
        """Keep tensors of the push that was begun last; a rank that begins none, beside others, keeps none."""
        if not self._current:
            return
        kept = self._pushes[self._current]
        kept |= {name: _host_copy(tensor.detach()) for name, tensor in named if name not in kept}

    def fetch(self, push: str, names: Sequence[str], num_rows: int | None) -> dict[str, torch.Tensor]:
        kept = self._pushes.get(push)
        if kept is None:
            raise PushError("the trainer no longer keeps the weights of that push")
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        found = {name: kept[name] for name in names if name in kept}
        if num_rows is None:
            return found
        # Copies: whoever pickles a view pickles all of its memory.
        return {name: tensor[:num_rows].clone() if tensor.dim() else tensor for name, tensor in found.items()}


class PushedTensors(Mapping[str, torch.Tensor]):
    """Has a push's tensors by name, and fetches each when it is asked for; raises PushError where a rank has not."""

    def __init__(
        self, names: Iterable[str], sources: Sequence[tuple[str, Source]], num_rows: int | None = None
    ) -> None:
        self._names, self._sources, self._num_rows = dict.fromkeys(names), tuple(sources), num_rows

    def heads(self, num_rows: int) -> PushedTensors:
        """Return the tensors' first rows: no more of them is fetched."""
        return PushedTensors(self._names, self._sources, num_rows)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        for push, source in self._sources:
            if found := source.fetch(push, [name], self._num_rows):
                return found[name]
        raise PushError(f"no rank of the trainer keeps {name}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _outdated(pushes: Mapping[str, Mapping[str, torch.Tensor]]) -> set[str]:
    """Return the pushes of a side that as many whole ones follow as are kept beside a new push, and parts of pushes."""
    size = max(map(len, pushes.values()), default=0)
    whole = [push for push, tensors in pushes.items() if len(tensors) == size]
    return pushes.keys() - whole[-(NUM_KEPT - 1) :]


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    on_gpu = tensor.device.type == "cuda"
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
    return copy.copy_(tensor, non_blocking=on_gpu)
