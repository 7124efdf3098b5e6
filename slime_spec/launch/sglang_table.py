"""SGLang's own flags, from the checked-in table of the pinned version, so that sglang need not be installed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from slime_spec.config.build import frozen
from slime_spec.config.schema import SGLANG, settings
from slime_spec.config.suggest import did_you_mean
from slime_spec.errors import ConfigError
from slime_spec.launch.texts import EXPECTS

TABLE = Path(__file__).with_name("sglang_flags.json")
# Spellings of older SGLang versions that users' scripts still carry, and what the pinned version calls them.
RENAMED = {"--cuda-graph-bs": "--cuda-graph-bs-decode", "--cuda-graph-max-bs": "--cuda-graph-max-bs-decode"}
PYTHON_TYPES: Mapping[str, type] = {"str": str, "int": int, "suffixed_int": int, "float": float, "bool": bool}


@dataclass(frozen=True)
class SglangFlag:
    """One ServerArgs flag: ``SglangFlag("cuda_graph_bs_decode", ("--cuda-graph-bs-decode",), "int", nargs="+")``.

    ``nargs`` is argparse's ("+", "*", "?", None for one value); ``type`` "bool" takes no value.
    """

    dest: str
    flags: tuple[str, ...]
    type: str
    nargs: str | None
    choices: tuple[object, ...]
    default: object
    help: str

    @property
    def path(self) -> str:
        return f"{SGLANG}.{self.dest}"

    @property
    def is_list(self) -> bool:
        return self.nargs in ("+", "*")

    @property
    def remedy(self) -> str:
        return f"SGLang says: {self.help}" if self.help else f"See the documentation of SGLang's {self.flags[0]}."

    def check(self, value: object) -> Any:
        """The value as Config.sglang holds it (None: SGLang's default); raises ConfigError."""
        if value is None or self.type == "json":
            return frozen(value)
        if not self.is_list:
            return self._check_one(value)
        if not isinstance(value, list | tuple) or (self.nargs == "+" and not value):
            raise ConfigError(self.path, f"must be a list, each {EXPECTS[self.type]}", value, self.remedy)
        return tuple(self._check_one(item) for item in value)

    def _check_one(self, value: object) -> object:
        if self.type == "float" and type(value) is int:
            value = float(value)
        if type(value) is not PYTHON_TYPES[self.type] or (isinstance(value, float) and not math.isfinite(value)):
            raise ConfigError(self.path, f"must be {EXPECTS[self.type]}", value, self.remedy)
        if self.choices and value not in self.choices:
            names = [str(choice) for choice in self.choices]
            hint = did_you_mean(str(value), names)
            raise ConfigError(self.path, f"must be one of {', '.join(names)}", value, hint + self.remedy)
        return value


@cache
def sglang_version() -> str:
    return str(json.loads(TABLE.read_text())["sglang"])


@cache
def sglang_flags() -> Mapping[str, SglangFlag]:
    """Every ServerArgs flag by its dest, the key in Config.sglang; old spellings are aliases."""
    old_spellings: dict[str, list[str]] = {}
    for old, new in RENAMED.items():
        old_spellings.setdefault(new, []).append(old)
    table = {}
    for row in json.loads(TABLE.read_text())["flags"]:
        aliases = [old for name in row["flags"] for old in old_spellings.get(name, ())]
        table[row["dest"]] = SglangFlag(
            dest=row["dest"],
            flags=(*row["flags"], *aliases),
            type=row["type"],
            nargs=row.get("nargs"),
            choices=tuple(row.get("choices", ())),
            default=row.get("default"),
            help=row["help"],
        )
    return table


@cache
def typed_elsewhere() -> Mapping[str, str]:
    """The SGLang flags that are settings of the tree: dest to the setting's path."""
    dest_of = {f"--sglang-{name[2:]}": flag.dest for flag in sglang_flags().values() for name in flag.flags}
    return {dest_of[name]: each.path for each in settings().values() for name in each.flags if name in dest_of}


def sglang_flag(dest: str) -> SglangFlag:
    """The flag behind ``sglang.<dest>``; raises ConfigError for an unknown one and for one the tree holds itself."""
    path = f"{SGLANG}.{dest}"
    if dest in typed_elsewhere():
        home = typed_elsewhere()[dest]
        raise ConfigError(path, f"is set as {home}", dest, f"Write {home}=VALUE.")
    if dest not in sglang_flags():
        hint = did_you_mean(dest, sglang_flags())
        raise ConfigError(
            path, f"is not a ServerArgs flag of SGLang {sglang_version()}", dest, f"{hint}Check its name."
        )
    return sglang_flags()[dest]


def check_sglang(values: Mapping[str, object]) -> dict[str, object]:
    """The ``sglang`` node, each value checked against the table."""
    return {dest: sglang_flag(dest).check(value) for dest, value in values.items()}
