"""``setting`` makes one setting: a dataclass field with its help, its flags and its bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any


def setting(
    default: Any,
    help: str,
    *,
    flags: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
) -> Any:
    """Return a configuration field; without ``flags`` its flag is its own name with hyphens.

    ``minimum``/``maximum`` are inclusive, ``above`` is exclusive; None values are not checked.
    """
    factory: Callable[[], Any] | None = default if callable(default) else None
    metadata = {
        "help": help,
        "flags": flags,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
    }
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)
