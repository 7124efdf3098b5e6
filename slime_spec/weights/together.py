"""Some tensors travel in one bucket of a push: who loads them makes one matrix of them and forgets a lone half.

SGLang joins ``q_a_proj`` and ``kv_a_proj_with_mqa`` of a layer while it loads one bucket, their scales likewise; a half
that came without the other is dropped without a word (DeepseekWeightLoader of 0.5.21). Codes in fp8 mean nothing
without their scales: a push that ends between the two leaves a weight that is neither the old nor the new.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch

from slime_spec.checkpoints.families.latent import LOADED_TOGETHER
from slime_spec.checkpoints.quantization import CODES, SCALE
from slime_spec.errors import PushError

Named = tuple[str, torch.Tensor]


def units(tensors: Iterable[Named]) -> Iterator[list[Named]]:
    """Yield the tensors, in order, in lists that must not be parted: from a first half to its second.

    The first half comes first, as in checkpoints and in what the trainer exports.
    """
    unit: list[Named] = []
    awaited: set[str] = set()
    gone: set[str] = set()
    for name, tensor in tensors:
        unit.append((name, tensor))
        awaited.discard(name)
        second = _second_of(name)
        seconds = set() if second is None else {second}
        if tensor.dtype == getattr(torch, CODES):
            seconds.add(name + SCALE)
        assert not seconds & gone, f"{seconds & gone} comes before {name}, which it must travel with"
        awaited |= seconds - {other for other, _ in unit}
        if not awaited:
            gone |= {other for other, _ in unit if other.endswith((*_SECONDS, SCALE))}
            yield unit
            unit = []
    if unit:
        yield unit


def check_together(bucket: Collection[str], push: Collection[str]) -> None:
    """Raise PushError for a bucket that has one of two tensors that travel together, where ``push`` brings both."""
    names = set(bucket)
    for name in names:
        partner = _second_of(name) or _first_of(name)
        if partner is not None and partner in push and partner not in names:
            raise PushError(f"{name} came in a bucket without {partner}: a server would drop it without a word")
        if name.endswith(SCALE):
            partner = name.removesuffix(SCALE)
        elif name + SCALE in push:
            partner = name + SCALE
        else:
            continue
        if partner not in names:
            raise PushError(f"{name} came in a bucket without {partner}: one means nothing without the other")


# A first half's end of name and its second's, of the weights and of their scales.
_PAIRS = (*LOADED_TOGETHER, *((first + SCALE, second + SCALE) for first, second in LOADED_TOGETHER))
_SECONDS = tuple(second for _, second in _PAIRS)


def _second_of(name: str) -> str | None:
    return next((name.removesuffix(one) + other for one, other in _PAIRS if name.endswith(one)), None)


def _first_of(name: str) -> str | None:
    return next((name.removesuffix(other) + one for one, other in _PAIRS if name.endswith(other)), None)


def in_order(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors with each first half before its second, as ``units`` takes them: files are in any order."""
    ordered: dict[str, torch.Tensor] = {}
    for name in tensors:
        first = _first_of(name) or name
        before = (first.removesuffix(SCALE), first, name.removesuffix(SCALE), name)
        ordered.update({each: tensors[each] for each in before if each in tensors})
    return ordered
