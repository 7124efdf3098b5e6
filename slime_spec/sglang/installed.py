"""What the SGLang of an interpreter knows: its version, its server's flags, the fields of its requests.

Asked of the interpreter itself, in a process of its own: a version string says little of patched builds.
Without an interpreter to ask, the flags are the checked-in table's.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from slime_spec.errors import ConfigError

TABLE = Path(__file__).with_name("flags.json")
SETTING = "sglang_server.python"
ASK_TIMEOUT_S = 300.0
QUESTION = """
import argparse, json, sys
from importlib.metadata import PackageNotFoundError, version
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser(add_help=False)
ServerArgs.add_cli_args(parser)
flags = [
    {"dest": action.dest, "flags": list(action.option_strings), "takes_value": action.nargs != 0}
    for action in parser._actions
]
try:
    router = version("sglang-router")
except PackageNotFoundError:
    router = None
print("SLIME_SPEC " + json.dumps(
    {"sglang": version("sglang"), "torch": version("torch"), "router": router, "flags": flags}
))
"""


@dataclass(frozen=True)
class ServerFlag:
    """``ServerFlag("tp_size", ("--tp-size", "--tensor-parallel-size"), takes_value=True)``"""

    dest: str
    spellings: tuple[str, ...]
    takes_value: bool


@dataclass(frozen=True)
class InstalledSglang:
    """``torch_version`` is None where no interpreter was asked, ``router_version`` where it has no sglang-router."""

    version: str
    torch_version: str | None
    flags: Mapping[str, ServerFlag]
    router_version: str | None = None

    def flag(self, dest: str) -> ServerFlag | None:
        return self.flags.get(dest)

    def by_spelling(self) -> dict[str, ServerFlag]:
        return {name: flag for flag in self.flags.values() for name in flag.spellings}


@cache
def checked_in() -> InstalledSglang:
    """The table of the pinned version."""
    data = json.loads(TABLE.read_text())
    flags = {
        row["dest"]: ServerFlag(row["dest"], tuple(row["flags"]), takes_value=row["type"] != "bool")
        for row in data["flags"]
    }
    return InstalledSglang(data["sglang"], None, flags)


@cache
def installed_in(python: str) -> InstalledSglang:
    """Ask the interpreter; raises ConfigError where it has no SGLang that answers."""
    remedy = "Pass --sglang-python with the interpreter of an environment that has sglang."
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "")}
    try:
        done = subprocess.run(
            [python, "-c", QUESTION], capture_output=True, text=True, timeout=ASK_TIMEOUT_S, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(SETTING, f"must be a Python that runs: {error}", python, remedy) from None
    answers = [line for line in done.stdout.splitlines() if line.startswith("SLIME_SPEC ")]
    if done.returncode or not answers:
        last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise ConfigError(SETTING, f"must have a working sglang: {last}", python, remedy)
    data = json.loads(answers[-1].removeprefix("SLIME_SPEC "))
    flags: dict[str, ServerFlag] = {}
    for row in data["flags"]:
        earlier = flags.get(row["dest"])
        spellings = (*earlier.spellings, *row["flags"]) if earlier else tuple(row["flags"])
        flags[row["dest"]] = ServerFlag(row["dest"], spellings, row["takes_value"])
    return InstalledSglang(data["sglang"], data["torch"], flags, data["router"])
