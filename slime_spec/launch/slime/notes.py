"""Say of a command line's flags of slime and Megatron which have no effect, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slime_spec.launch.slime import model_shape
from slime_spec.launch.slime.megatron import without_effect_of_megatron
from slime_spec.launch.slime.without_effect import CONFIG_JSON, WANDB_KEY, WITHOUT_EFFECT, WithoutEffect


def without_effect(name: str) -> WithoutEffect | None:
    """Return what is known of a flag that changes nothing; None where it does, or says the model's shape."""
    return WITHOUT_EFFECT.get(name) or without_effect_of_megatron().get(name)


def reason_of(name: str) -> str:
    """Return why a flag, by the path that it sets, changes nothing; empty where it does change something."""
    if name in model_shape.NAMES:
        return CONFIG_JSON
    each = without_effect(name)
    return "" if each is None else each.reason


def notes_of_slime(given: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a note for each reason, with the flags whose values have no effect for it."""
    by_reason: dict[str, list[str]] = {}
    for name, texts in given.items():
        if reason := reason_of(name):
            shown = [name] if texts == ("true",) or name == WANDB_KEY else [name, *texts]
            by_reason.setdefault(reason, []).append(" ".join(shown))
    return tuple(f"No effect, as {reason}: {', '.join(names)}." for reason, names in by_reason.items())
