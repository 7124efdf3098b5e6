"""A hook, a contract and a feature are what the plug-in declares of itself; nothing here imports SGLang.

A feature has one contract per generation of SGLang's sources. The first contract whose names all look as expected is
hooked; where none fits, the feature does nothing and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["before", "after", "around"]
Process = Literal["main", "scheduler"]


@dataclass(frozen=True)
class Name:
    """A function of SGLang with all its parameters in order, or a class with the fields and methods that are used.

    ``Name("sglang.srt.managers.scheduler.Scheduler.flush_cache", ("self", "empty_cache"))``
    """

    target: str
    parameters: tuple[str, ...] = ()
    members: tuple[str, ...] = ()  # of a class, which has no parameters here


@dataclass(frozen=True)
class Hook:
    """A function of this package around, before or after a function of SGLang, as its registry of hooks calls it."""

    name: Name
    kind: Kind
    process: Process  # whose calls it is for: main has the tokenizer manager and HTTP
    function: Callable[..., Any]
    # A module that a server of another kind need not load (the HTTP server of an engine without one).
    only_where_loaded: bool = False


@dataclass(frozen=True)
class Contract:
    """The hooks that suit some releases of SGLang, and the other names that they rely on."""

    releases: str  # for people: "0.5.21 to 0.5.23"
    hooks: tuple[Hook, ...]
    needs: tuple[Name, ...] = ()

    @property
    def names(self) -> tuple[Name, ...]:
        return (*(hook.name for hook in self.hooks), *self.needs)


@dataclass(frozen=True)
class Feature:
    """A part of the plug-in that works whole or not at all; its name is what the environment turns it off by."""

    name: str
    does: str
    contracts: tuple[Contract, ...]
