"""A trainer that shares its GPU with an engine keeps on the GPU what a phase needs; the rest waits in host memory.

    phase     parameters  gradients  optimizer  reference
    rollout      host         -        host       host
    step         GPU         GPU       GPU        GPU
    push         GPU          -        host       host
    save         host         -        host       host      a checkpoint is written from the host's copies

A tensor leaves by its storage, which is emptied in place, so that every view of it (parameters in Megatron's buffer,
gradients, masters) is the same view when the storage is filled again. Gradients are sums of one step and are not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

import torch

from slime_spec.memory import release_freed_memory


class Part(Enum):
    """Names a part of the trainer's memory; a storage that two parts share belongs to the first of them."""

    PARAMETERS = "parameters"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    REFERENCE = "reference"


Tensors = Mapping[Part, Callable[[], Iterable[torch.Tensor]]]


@dataclass
class _Kept:
    """Keeps a storage's bytes on the host; ``is_away``: the device has none of them; ``is_current``: both agree."""

    part: Part
    num_bytes: int
    host: torch.Tensor | None  # None for gradients
    is_away: bool = False
    is_current: bool = False


class Residency:
    """Moves the trainer's parts between its device and the host.

    ``tensors`` lists each part's tensors whenever it is asked, as Adam's moments begin with the first step. ``device``
    is the type of device whose tensors move; None moves nothing, and only ``held`` changes.

    Example::

        residency = Residency({Part.PARAMETERS: model.parameters, ...}, "cuda")
        residency.hold()                         # during rollouts
        with residency.stepping():
            optimizer.step()
    """

    def __init__(self, tensors: Tensors, device: str | None) -> None:
        self._tensors = tensors
        self._device = device
        self._kept: dict[int, _Kept] = {}
        self.held = frozenset(Part)

    def hold(self, *parts: Part) -> None:
        """Have exactly these parts on the device."""
        leaving, coming = self.held - frozenset(parts), frozenset(parts) - self.held
        self.held = frozenset(parts)
        if self._device is None:
            return
        if leaving:
            self._leave(leaving)
        for part in coming:
            for storage in self._storages(part):
                self._return(storage)

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Have all parts on the device for the length of the block, which changes them; none afterwards."""
        self.hold(*Part)
        for kept in self._kept.values():
            kept.is_current = kept.part is Part.REFERENCE
        try:
            yield
        finally:
            self.hold()

    def on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor, or the same view of the host's copy where its storage is away."""
        kept = self._kept.get(_key(tensor.untyped_storage()))
        if kept is None or not kept.is_away:
            return tensor
        assert kept.host is not None, "gradients are not kept"
        return kept.host.view(tensor.dtype).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    def _storages(self, part: Part) -> list[torch.UntypedStorage]:
        """Return the part's own storages, those on the device and those that have left it."""
        found: dict[int, torch.UntypedStorage] = {}
        for each in Part:
            own = {_key(s): s for s in (t.untyped_storage() for t in self._tensors[each]()) if self._moves(s)}
            if each is part:
                return [storage for key, storage in own.items() if key not in found]
            found |= own
        raise AssertionError(f"{part} is no part")

    def _moves(self, storage: torch.UntypedStorage) -> bool:
        return storage.device.type == self._device and (storage.nbytes() > 0 or _key(storage) in self._kept)

    def _leave(self, parts: Iterable[Part]) -> None:
        leaving = [(storage, self._keep(storage, part)) for part in parts for storage in self._storages(part)]
        for storage, kept in leaving:
            if kept.host is not None and not kept.is_current:
                kept.host.copy_(_bytes_of(storage), non_blocking=True)
            kept.is_current = kept.is_away = True
        if self._device == "cuda":
            torch.cuda.synchronize()  # the copies must be whole before their sources go
        for storage, _ in leaving:
            storage.resize_(0)
        release_freed_memory()

    def _keep(self, storage: torch.UntypedStorage, part: Part) -> _Kept:
        key, num_bytes = _key(storage), storage.nbytes()
        if key not in self._kept:
            host = None
            if part is not Part.GRADIENTS:
                host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
            self._kept[key] = _Kept(part, num_bytes, host)
        return self._kept[key]

    def _return(self, storage: torch.UntypedStorage) -> None:
        kept = self._kept[_key(storage)]
        storage.resize_(kept.num_bytes)
        if kept.host is not None:
            _bytes_of(storage).copy_(kept.host, non_blocking=True)
        kept.is_away = False


def _key(storage: torch.UntypedStorage) -> int:
    """Return a number that all Python objects of one storage share, also while the storage is empty."""
    return int(storage._cdata)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
