"""Hooks, contracts and features declare what the plug-in does to SGLang; nothing here imports it.

A feature has one contract per generation of SGLang's sources. The first contract whose names all look as expected is
hooked; where none fits, the feature does nothing and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from typing import Any, Literal

Kind = Literal["before", "after", "around"]
Process = Literal["main", "scheduler"]


@dataclass(frozen=True)
class Name:
    """A function of SGLang with all its parameters in order, or a class with what of it is used.

    ``Name("sglang.srt.managers.scheduler.Scheduler.flush_cache", ("self", "empty_cache"))``
    """

    target: str
    parameters: tuple[str, ...] = ()
    members: tuple[str, ...] = ()  # of a class, which has no parameters here: its fields and methods
    attributes: tuple[str, ...] = ()  # of a class's instances, which its methods set or read by that name
    # In a module that need not be loaded, and is not loaded for this: an engine has no HTTP server.
    only_where_loaded: bool = False


@dataclass(frozen=True)
class Hook:
    """A function of this package around, before or after a function of SGLang, as its registry of hooks calls it."""

    name: Name
    kind: Kind
    process: Process  # whose calls it is for: main has the tokenizer manager and HTTP
    function: Callable[..., Any]


@dataclass(frozen=True)
class Contract:
    """The hooks that suit some releases of SGLang, and the other names that they rely on."""

    releases: str  # for people: "0.5.21 to 0.5.23"
    hooks: tuple[Hook, ...]
    needs: tuple[Name, ...] = ()

    @property
    def names(self) -> tuple[Name, ...]:
        return (*(hook.name for hook in self.hooks), *self.needs)

    def within(self, process: str, modules: Container[str]) -> Contract:
        """The part that a process takes, which has loaded ``modules``.

        Main takes all hooks: where SGLang calls its functions otherwise, a scheduler is taken for it.
        """

        def is_there(name: Name) -> bool:
            return not name.only_where_loaded or name.target.rpartition(".")[0] in modules

        taken = tuple(hook for hook in self.hooks if process == "main" or hook.process == process)
        return replace(
            self,
            hooks=tuple(hook for hook in taken if is_there(hook.name)),
            needs=tuple(name for name in self.needs if is_there(name)),
        )


@dataclass(frozen=True)
class Feature:
    """A part of the plug-in that works whole or not at all; its name is what the environment turns it off by."""

    name: str
    does: str
    contracts: tuple[Contract, ...]
