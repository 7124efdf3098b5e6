"""A Key says of one key of a config.json which values stand for a model that is computed here.

Families and draft formats declare their keys as tables; ``check_keys`` is the one mechanism that holds a config.json
against such a table, for targets, drafts and MTP layers alike. What no table names changes nothing in transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from slime_spec.errors import CheckpointError, NotComputedError
from slime_spec.files import shortened

LARGEST = 2**31 - 1
CORRECT = "Correct the config.json, or copy the checkpoint again."
ANOTHER = "Choose another checkpoint, or serve this one with --rollout-engine sglang --debug-rollout-only."


@dataclass(frozen=True)
class Key:
    """Describes one key: ``accepts`` the values that are computed, and the ``rule`` that others break.

    Null and absence are accepted always: they mean the default. A value that an ``is_choice`` key does not accept
    describes a valid model that is not computed here; of another key it is a damaged config.json. A key without a
    rule changes no logits; ``why`` says why that is so, or why other values are refused.
    """

    accepts: Callable[[Any], bool]
    rule: str = ""
    why: str = ""
    is_choice: bool = False


Keys = Mapping[str, Key]


def whole(least: int = 1, most: int = LARGEST) -> Key:
    """Return the key of a number that is computed with: a whole number in a range."""
    return Key(
        lambda value: type(value) is int and least <= value <= most, f"must be a whole number, {least} to {most}"
    )


def real(least: float, most: float) -> Key:
    """Return the key of a number that is computed with: any finite number in a range."""
    return Key(
        lambda value: type(value) in (int, float) and least <= value <= most, f"must be a number, {least:g} to {most:g}"
    )


def flag() -> Key:
    """Return the key of a switch that is computed either way."""
    return Key(lambda value: isinstance(value, bool), "must be true or false")


def text() -> Key:
    return Key(lambda value: isinstance(value, str), "must be a text")


def entries() -> Key:
    return Key(lambda value: isinstance(value, dict), "must be an object")


def listed(item: Key, also_single: bool = False) -> Key:
    """Return the key of a list, each item of which ``item`` accepts; ``also_single`` accepts a bare item too."""

    def accepts(value: Any) -> bool:
        return all(map(item.accepts, value)) if isinstance(value, list) else also_single and item.accepts(value)

    return Key(accepts, f"{item.rule}, or a list of them" if also_single else f"must be a list: each item {item.rule}")


def only(*values: Any, why: str = "") -> Key:
    """Return the key of a choice of which ``values`` alone are computed."""
    told = " or ".join("false" if value is False else "true" if value is True else str(value) for value in values)
    return Key(
        lambda value: isinstance(value, bool | int | float | str) and value in values,
        f"must be {told or 'left out'}: no other value is computed here",
        why,
        is_choice=True,
    )


def harmless(why: str) -> Key:
    """Return a key that transformers knows and that changes no logits."""
    return Key(lambda value: True, why=why)


def check_keys(config: Mapping[str, Any], keys: Keys, source: str, within: str = "") -> None:
    """Raise CheckpointError naming the first key whose value ``keys`` does not accept.

    ``source`` is the path of the config.json; ``within`` precedes the names of keys of a nested object.
    """
    for name, key in keys.items():
        value = config.get(name)
        if value is not None and not key.accepts(value):
            kind, remedy = (NotComputedError, ANOTHER) if key.is_choice else (CheckpointError, CORRECT)
            rule = f"{key.rule} ({key.why})" if key.why else key.rule
            raise kind(f"{source}: {within}{name}", rule, shown(value), remedy)


def shown(value: Any) -> Any:
    """Return ``value`` as an error shows it: short, however large or deep the value of a damaged file is."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    is_short = value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) <= LARGEST)
    return value if is_short else shortened(str(value))
