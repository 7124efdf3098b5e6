"""Some tensors travel in one bucket of a push: who loads them makes one matrix of them and forgets a lone half.

SGLang joins ``q_a_proj`` and ``kv_a_proj_with_mqa`` of a layer while it loads one bucket; a half that came without the
other is dropped without a word (DeepseekWeightLoader of 0.5.21).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch

from slime_spec.checkpoints.families.latent import LOADED_TOGETHER
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
        if second := _second_of(name):
            assert second not in gone, f"{second} comes before {name}, which it must travel with"
            if all(other != second for other, _ in unit):
                awaited.add(second)
        if not awaited:
            gone |= {other for other, _ in unit if other.endswith(_SECONDS)}
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


_SECONDS = tuple(second for _, second in LOADED_TOGETHER)


def _second_of(name: str) -> str | None:
    return next((name.removesuffix(one) + other for one, other in LOADED_TOGETHER if name.endswith(one)), None)


def _first_of(name: str) -> str | None:
    return next((name.removesuffix(other) + one for one, other in LOADED_TOGETHER if name.endswith(other)), None)
