"""The schema lists the settings of the configuration tree: path, type, default, bounds, help and flags of each."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from operator import attrgetter
from typing import Any

from slime_spec.config.setting import AUTO
from slime_spec.config.texts import is_text
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.suggest import did_you_mean

# The one node that is not a dataclass: SGLang's own flags, whose types the launch package knows.
SGLANG = "sglang"
TYPE_NAMES = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false"}


@dataclass(frozen=True)
class Setting:
    """Describes one leaf of the configuration tree.

    Example: ``Setting("rollout.batch_size", type=int, is_optional=False, is_tuple=False, default=8, ...)``
    """

    path: str
    type: type
    is_optional: bool
    is_tuple: bool
    default: Any
    help: str
    flags: tuple[str, ...]
    choices: tuple[str, ...]
    minimum: float | None
    maximum: float | None
    above: float | None
    below: float | None
    may_be_empty: bool
    is_automatic: bool

    @property
    def node(self) -> str:
        return self.path.partition(".")[0]

    @property
    def expects(self) -> str:
        """Return what a value must be, in words: "a whole number or null"."""
        name = f"a list of values, each {TYPE_NAMES[self.type]}" if self.is_tuple else TYPE_NAMES[self.type]
        return f"{name} or null" if self.is_optional else name

    @property
    def remedy(self) -> str:
        example = {str: "NAME" if self.choices else "TEXT", int: "N", float: "X", bool: "true|false"}[self.type]
        if self.type is bool:
            return f"Pass {self.flags[0]}, --no-{self.flags[0][2:]} or {self.path}={example}."
        return f"Pass {self.flags[0]} {example} or {self.path}={example}."

    def check(self, value: object) -> Any:
        """Return the value as the dataclass holds it (ints widen to float, lists become tuples); raises ConfigError."""
        if self.is_optional and (value is None or (self.is_automatic and value == AUTO)):
            return None
        if self.is_tuple:
            if not isinstance(value, list | tuple):
                raise ConfigError(self.path, f"must be {self.expects}", value, self.remedy)
            return tuple(self._check_one(item) for item in value)
        return self._check_one(value)

    def _check_one(self, value: object) -> Any:
        if self.type is float and type(value) is int and abs(value) < 2**63:
            value = float(value)
        # isinstance would take True for the number 1
        if type(value) is not self.type or (isinstance(value, float) and not math.isfinite(value)):
            raise ConfigError(self.path, f"must be {self.expects}", value, self.remedy)
        if isinstance(value, str) and (rule := self._broken_rule_of_texts(value)):
            raise ConfigError(self.path, rule, value, self.remedy)
        if isinstance(value, str) and self.choices and value not in self.choices:
            hint = did_you_mean(value, self.choices)
            raise ConfigError(self.path, f"must be one of {', '.join(self.choices)}", value, hint + self.remedy)
        if isinstance(value, int | float) and (rule := self._broken_bound(value)):
            raise ConfigError(self.path, rule, value, self.remedy)
        return value

    def _broken_rule_of_texts(self, value: str) -> str:
        if not is_text(value):
            return "must be text that a file can hold, without NUL"
        return "" if value or self.may_be_empty else "must not be an empty text"

    def _broken_bound(self, value: float) -> str:
        if self.minimum is not None and value < self.minimum:
            return f"must be at least {_shown(self.minimum)}"
        if self.above is not None and value <= self.above:
            return f"must be above {_shown(self.above)}"
        if self.maximum is not None and value > self.maximum:
            return f"must be at most {_shown(self.maximum)}"
        if self.below is not None and value >= self.below:
            return f"must be below {_shown(self.below)}"
        return ""


def _shown(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


@cache
def nodes() -> Mapping[str, type]:
    """Return the tree's nodes in order, each with its dataclass."""
    hints = typing.get_type_hints(Config)
    return {f.name: hints[f.name] for f in fields(Config) if f.name != SGLANG}


@cache
def settings() -> Mapping[str, Setting]:
    """Return every setting of the tree by its path, in the tree's order."""
    return {path: each for node, cls in nodes().items() for path, each in settings_of(node, cls).items()}


def settings_of(node: str, cls: type) -> dict[str, Setting]:
    """Return the settings of one dataclass by their paths, which begin with ``node``."""
    hints = typing.get_type_hints(cls)
    return {f"{node}.{leaf.name}": _setting(f"{node}.{leaf.name}", leaf, hints[leaf.name]) for leaf in fields(cls)}


def by_flag(config: Config) -> dict[str, Any]:
    """Return every setting's value by the names that slime's ``args`` has: ``{"n_samples_per_prompt": 8, ...}``."""
    return {
        flag.removeprefix("--").replace("-", "_"): attrgetter(setting.path)(config)
        for setting in settings().values()
        for flag in setting.flags
    }


def _setting(path: str, leaf: Field[Any], hint: Any) -> Setting:
    kinds = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}
    is_optional = types.NoneType in kinds
    (kind,) = kinds - {types.NoneType}
    is_tuple = typing.get_origin(kind) is tuple
    meta = dict(leaf.metadata)
    flags = meta.pop("flags") or (f"--{leaf.name.replace('_', '-')}",)
    assert leaf.default is not MISSING, f"{path} has no default"
    return Setting(
        path=path,
        type=typing.get_args(kind)[0] if is_tuple else kind,
        is_optional=is_optional,
        is_tuple=is_tuple,
        default=leaf.default,
        flags=flags,
        **meta,
    )
