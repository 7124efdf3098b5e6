"""This module finds the known name that is nearest to a mistyped name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most like ``name``, letter case, hyphens and underscores aside; None when none is near."""
    by_plain = {_plain(candidate): candidate for candidate in known}
    near = difflib.get_close_matches(_plain(name), by_plain, n=1, cutoff=0.6)
    return by_plain[near[0]] if near else None


def did_you_mean(name: str, known: Iterable[str], written: Callable[[str], str] = str) -> str:
    """Return ``"Did you mean trainer.lr? "``, or nothing when no known name is near: put it before the remedy.

    ``written`` says how the name stands in the sentence: ``repr`` quotes it.
    """
    near = closest(name, known)
    return f"Did you mean {written(near)}? " if near else ""


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
