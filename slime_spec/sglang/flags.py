"""The module reads SGLang's flags from the checked-in table of the pinned version; sglang need not be installed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from slime_spec.config.build import frozen
from slime_spec.config.schema import SGLANG, Setting, settings
from slime_spec.config.texts import EXPECTS, NULLS, PARSERS, check_json, is_text
from slime_spec.errors import ConfigError, raise_all
from slime_spec.suggest import did_you_mean

TABLE = Path(__file__).with_name("flags.json")
HIGHEST = 2**63 - 1  # of whole numbers
PREFIX = "--sglang-"  # begins our spelling of a flag
# Spellings of older SGLang versions that users' scripts still carry, and what the pinned version calls them.
RENAMED = {
    "--cuda-graph-bs": "--cuda-graph-bs-decode",
    "--cuda-graph-max-bs": "--cuda-graph-max-bs-decode",
    "--mamba-scheduler-strategy": "--mamba-radix-cache-strategy",
    "--nsa-decode-backend": "--dsa-decode-backend",
    "--nsa-prefill-backend": "--dsa-prefill-backend",
}
PYTHON_TYPES: Mapping[str, type] = {"str": str, "int": int, "suffixed_int": int, "float": float, "bool": bool}


@dataclass(frozen=True)
class SglangFlag:
    """Holds a ServerArgs flag: ``SglangFlag("cuda_graph_bs_decode", ("--cuda-graph-bs-decode",), "int", nargs="+")``.

    ``nargs`` is argparse's ("+", "*", "?", None for one value); ``type`` "bool" takes no value. ``aliases`` are
    spellings of older versions, which the server itself does not take.
    """

    dest: str
    spellings: tuple[str, ...]
    type: str
    nargs: str | None = None
    choices: tuple[object, ...] = ()
    default: object = None
    help: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def flags(self) -> tuple[str, ...]:
        """Return every spelling that a user may write."""
        return (*self.spellings, *self.aliases)

    @property
    def takes_value(self) -> bool:
        return self.type != "bool"

    @property
    def path(self) -> str:
        return f"{SGLANG}.{self.dest}"

    @property
    def is_list(self) -> bool:
        return self.nargs in ("+", "*")

    @property
    def remedy(self) -> str:
        return f"SGLang says: {self.help}" if self.help else f"See the documentation of SGLang's {self.flags[0]}."

    def parse(self, texts: Sequence[str]) -> Any:
        """Return the checked value of the words that follow the flag; raises ConfigError.

        argparse's "?" without a word means the flag's const, which is the empty text wherever SGLang uses it.
        """
        values = [self.parse_one(text) for text in texts]
        return self.check(values if self.is_list else values[0] if values else "")

    def parse_one(self, text: str) -> object:
        """Return the value of one word (``null`` may itself be a choice)."""
        if text in NULLS and text not in self.choices:
            return None
        try:
            return PARSERS[self.type](text)
        except ValueError:
            raise ConfigError(self.path, f"must be {EXPECTS[self.type]}", text, self.remedy) from None

    def check(self, value: object) -> Any:
        """Return the value as Config.sglang holds it (None: SGLang's default); raises ConfigError."""
        if value is None or self.type == "json":
            return self._checked_json(value)
        if not self.is_list:
            return self._check_one(value)
        if not isinstance(value, list | tuple) or (self.nargs == "+" and not value):
            raise ConfigError(self.path, f"must be a list, each {EXPECTS[self.type]}", value, self.remedy)
        return tuple(self._check_one(item) for item in value)

    def has_type_of(self, value: object) -> bool:
        """Return whether a server may report ``value`` of this flag: None, JSON, or what its type says."""
        if value is None or self.type == "json":
            return True
        types = (int, float) if self.type == "float" else (PYTHON_TYPES[self.type],)
        if self.is_list:
            return isinstance(value, list) and all(type(item) in types for item in value)
        return type(value) in types

    def _checked_json(self, value: object) -> Any:
        try:
            check_json(value)
        except ValueError:
            rule = "must be JSON of finite numbers and texts that a file can hold"
            raise ConfigError(self.path, rule, value, self.remedy) from None
        return frozen(value)

    def _check_one(self, value: object) -> object:
        if self.type == "float" and type(value) is int and abs(value) <= HIGHEST:
            value = float(value)
        if type(value) is not PYTHON_TYPES[self.type] or (isinstance(value, float) and not math.isfinite(value)):
            raise ConfigError(self.path, f"must be {EXPECTS[self.type]}", value, self.remedy)
        if isinstance(value, int) and abs(value) > HIGHEST:
            raise ConfigError(self.path, f"must be at most {HIGHEST}", value, self.remedy)
        if isinstance(value, str) and not is_text(value):
            raise ConfigError(self.path, "must be text that a file can hold, without NUL", value, self.remedy)
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
    """Return every ServerArgs flag by its dest, the key in Config.sglang; old spellings are aliases."""
    old_spellings: dict[str, list[str]] = {}
    for old, new in RENAMED.items():
        old_spellings.setdefault(new, []).append(old)
    table = {}
    for row in json.loads(TABLE.read_text())["flags"]:
        aliases = [old for name in row["flags"] for old in old_spellings.get(name, ())]
        table[row["dest"]] = SglangFlag(
            dest=row["dest"],
            spellings=tuple(row["flags"]),
            type=row["type"],
            nargs=row.get("nargs"),
            choices=tuple(row.get("choices", ())),
            default=row.get("default"),
            help=row["help"],
            aliases=tuple(aliases),
        )
    return table


@cache
def typed_elsewhere() -> Mapping[str, str]:
    """Return the SGLang flags that are settings of the tree, as a map from dest to the setting's path."""
    dest_of = {f"{PREFIX}{name[2:]}": flag.dest for flag in sglang_flags().values() for name in flag.flags}
    return {dest_of[name]: each.path for each in settings().values() for name in each.flags if name in dest_of}


@cache
def engine_settings() -> Mapping[str, Setting]:
    """Return the settings of the engine's and the speculative node that SGLang's flags set, by dest.

    The tree may know a flag of SGLang's speculation that the pinned version does not have yet.
    """
    newer = {
        name.removeprefix(PREFIX).replace("-", "_"): each.path
        for each in settings().values()
        for name in each.flags
        if name.startswith(f"{PREFIX}speculative-")
    }
    homes = {dest: settings()[path] for dest, path in {**newer, **typed_elsewhere()}.items()}
    return {dest: setting for dest, setting in homes.items() if setting.node in ("engine", "speculative")}


def sglang_flag(dest: str) -> SglangFlag:
    """Return the flag behind ``sglang.<dest>``.

    Raises ConfigError for an unknown one and for one the tree holds itself.
    """
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
    """Return the ``sglang`` node, each value checked against the table; raises ConfigError for all that are wrong."""
    checked, errors = {}, []
    for dest, value in values.items():
        try:
            checked[dest] = sglang_flag(dest).check(value)
        except ConfigError as error:
            errors.append(error)
    raise_all(errors)
    return checked


@cache
def flags_by_spelling() -> Mapping[str, SglangFlag]:
    """Return every flag by each of its spellings on a server's own command line."""
    return {name: flag for flag in sglang_flags().values() for name in flag.flags}


def read_server_words(words: Sequence[str]) -> dict[str, object]:
    """Return the flags on a server's own command line by their dest; raises ConfigError for one that the table lacks.

    Example: ``read_server_words(["--page-size", "16", "--disable-radix-cache"])`` is
    ``{"page_size": 16, "disable_radix_cache": True}``
    """
    values: dict[str, object] = {}
    position = 0
    while position < len(words):
        name, is_attached, attached = words[position].partition("=")
        flag = flags_by_spelling().get(name)
        if flag is None:
            hint = did_you_mean(name, flags_by_spelling())
            raise ConfigError(name, f"is no flag of SGLang {sglang_version()}", words[position], f"{hint}Correct it.")
        texts = [attached] if is_attached else _texts_after(words[position + 1 :], flag)
        position += 1 if is_attached else 1 + len(texts)
        values[flag.dest] = flag.parse(texts or (["true"] if flag.type == "bool" else []))
    return values


def _texts_after(words: Sequence[str], flag: SglangFlag) -> list[str]:
    """Return the words that are the flag's values: none for a switch, all words up to the next flag for a list."""
    if flag.type == "bool":
        return []
    end = next((index for index, word in enumerate(words) if word.startswith("--")), len(words))
    return list(words[: end if flag.is_list else min(end, 1)])
