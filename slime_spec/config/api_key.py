"""The key of SGLang's servers comes from a file or the environment, because command lines and settings can be read.

Every local user reads the command lines of all processes, and a run keeps its settings in files. A setting therefore
only says where the key is; who needs it reads it there, on its own node.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.files import read_text

SETTING = "sglang_server.api_key_file"
VARIABLE = "SLIME_SPEC_SGLANG_API_KEY"
FROM_ENVIRONMENT = "env:"
HIDDEN = "***"
REMEDY = f"Put the key into {VARIABLE}, or into a file of mode 0600 and pass --sglang-api-key-file FILE."
# Flags of SGLang whose values are secrets, by their dests, and those of its router besides.
SECRETS = ("api_key", "admin_api_key", "ssl_keyfile_password")
SECRETS_OF_ROUTER = ("control_plane_api_keys", "oracle_password")
NO_SECRET = "--ssl-keyfile"  # which begins as a secret does
KEY = re.compile(r"[A-Za-z0-9._~+/=-]+")  # what an Authorization header may carry (RFC 6750)


def refuse_literal_keys(config: Config) -> None:
    """Raise ConfigError for a secret among the settings; the error does not repeat it."""
    for dest in SECRETS:
        if dest in config.sglang:
            flag = f"--sglang-{dest.replace('_', '-')}"
            rule = f"must not be on a command line or in a file of settings ({flag}): others can read it there"
            raise ConfigError(f"sglang.{dest}", rule, HIDDEN, REMEDY if dest == "api_key" else "Leave it out.")
    server = config.sglang_server
    for name, words in (("extra_args", server.extra_args), ("router_args", server.router_args)):
        if any(map(_names_a_secret, words)):
            raise ConfigError(f"sglang_server.{name}", "must hold no key: others can read it there", HIDDEN, REMEDY)


def _names_a_secret(word: str) -> bool:
    """Return whether a word is the flag of a secret, also one cut short, as SGLang's parsers take it."""
    flag = word.partition("=")[0]
    spellings = (f"--{dest.replace('_', '-')}" for dest in (*SECRETS, *SECRETS_OF_ROUTER))
    return len(flag) > 2 and flag != NO_SECRET and any(spelling.startswith(flag) for spelling in spellings)


def with_key_of_environment(config: Config, environ: Mapping[str, str]) -> Config:
    """Return the configuration whose servers have the key of the environment, where it has one and no file is named.

    The setting then names the variable: an engine on a node without it is refused, not started without a key.
    """
    if config.sglang_server.api_key_file is not None or not environ.get(VARIABLE):
        return config
    return replace(config, sglang_server=replace(config.sglang_server, api_key_file=f"{FROM_ENVIRONMENT}{VARIABLE}"))


def api_key_of(config: Config) -> str | None:
    """Read the servers' key where the setting says; raises ConfigError where it is not, or others can read it."""
    source = config.sglang_server.api_key_file
    if source is None:
        return None
    return read_key(SETTING, source, REMEDY)


def read_key(setting: str, source: str, remedy: str) -> str:
    """Read the key that ``source`` names: ``env:NAME`` a variable, else a file of mode 0600; raises ConfigError."""
    if source.startswith(FROM_ENVIRONMENT):
        key = os.environ.get(source.removeprefix(FROM_ENVIRONMENT), "")
        if not key:
            raise ConfigError(setting, "must name a variable that this node's environment has", source, remedy)
    else:
        _check_mode(setting, Path(source), remedy)
        key = read_text(Path(source), remedy=remedy).strip()
    if not KEY.fullmatch(key):
        rule = f"must lead to one key of letters, digits and . _ ~ + / = -; it has {len(key)} characters"
        raise ConfigError(setting, rule, source, remedy)
    return key


def _check_mode(setting: str, path: Path, remedy: str) -> None:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(setting, f"must be a file that can be read: {why}", str(path), remedy) from None
    if not stat.S_ISREG(mode):
        raise ConfigError(setting, "must be a file", str(path), remedy)
    if mode & 0o077:
        raise ConfigError(
            setting, f"must be readable by its owner alone; its mode is {mode & 0o777:04o}", str(path), "chmod 600 it."
        )
