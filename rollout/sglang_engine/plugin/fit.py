"""The check compares the names of this process's SGLang with those that a contract expects, before any is hooked."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Sequence
from types import FunctionType

from rollout.sglang_engine.plugin.hooks import Contract, Name


def misfit(name: Name) -> str | None:
    """What of a name differs, in words for a log line; nothing where it is as expected."""
    try:
        found = pkgutil.resolve_name(name.target)
    except (ImportError, AttributeError) as error:
        return f"{name.target} is missing ({error})"
    if isinstance(found, type):
        missing = [member for member in name.members if member not in members(found)]
        missing += [attribute for attribute in name.attributes if attribute not in used_names(found)]
        return f"{name.target} has no {', '.join(missing)}" if missing else None
    parameters = tuple(inspect.signature(found).parameters)
    if parameters != name.parameters:
        return f"{name.target} takes ({', '.join(parameters)}) instead of ({', '.join(name.parameters)})"
    return None


def members(found: type) -> set[str]:
    """The methods and annotated fields of a class and its bases; ``dir`` leaves out an enumeration's methods."""
    of_bases = (vars(base) for base in found.__mro__)
    return {name for names in of_bases for name in (*names, *names.get("__annotations__", {}))}


def used_names(found: type) -> set[str]:
    """The names in the code of a class's methods: what instances have is nowhere declared."""
    values = (value for base in found.__mro__ for value in vars(base).values())
    functions = (value.fget if isinstance(value, property) else value for value in values)
    codes = (inspect.unwrap(each).__code__ for each in functions if isinstance(each, FunctionType))
    return {name for code in codes for name in code.co_names}


def fitting(contracts: Sequence[Contract]) -> tuple[Contract | None, list[str]]:
    """The first contract that fits, and else what each one misses."""
    misfits = []
    for contract in contracts:
        differences = [difference for name in contract.names if (difference := misfit(name))]
        if not differences:
            return contract, []
        misfits.append(f"as of {contract.releases}: {'; '.join(differences)}")
    return None, misfits
