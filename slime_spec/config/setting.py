"""``setting`` makes one setting: a dataclass field with its help, its flags and its bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any

# Upper bounds that no run needs to exceed: a mistyped number is refused, before somebody makes a list as long as it.
INT32 = 2**31 - 1
MACHINES = 10_000  # engines, ranks, GPUs
CORES = 1_024  # of one process
SAMPLES = 1_000_000  # prompts, samples, requests of one step
DRAFTS = 1_000  # tokens of one round
MAX_WAIT_S = 1e6
AUTO = "auto"  # another word for no value, of settings that are then decided by the program


def setting(
    default: Any,
    help: str,
    *,
    flags: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    may_be_empty: bool = False,
    is_automatic: bool = False,
) -> Any:
    """Return a configuration field; without ``flags`` its flag is its own name with hyphens.

    Every number has a least (``minimum``, or ``above`` without the bound itself) and a greatest value (``maximum``, or
    ``below``); a list's are each element's. A text is not empty, unless ``may_be_empty``.
    Where no value ``is_automatic``, "auto" is another word for none.
    """
    factory: Callable[[], Any] | None = default if callable(default) else None
    metadata = {
        "help": help,
        "flags": flags,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "below": below,
        "may_be_empty": may_be_empty,
        "is_automatic": is_automatic,
    }
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)
