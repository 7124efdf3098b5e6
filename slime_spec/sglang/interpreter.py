"""The module asks an interpreter's SGLang for its version, its server's flags and the model types that it supports.

The interpreter runs in a process of its own: a version string alone says little about patched builds.
Without an interpreter to ask, the flags are the checked-in table's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from slime_spec.errors import ConfigError
from slime_spec.files import parse_json_object
from slime_spec.sglang.flags import SglangFlag, sglang_flags, sglang_version
from slime_spec.sglang.releases import Release, pinned_release, release_of

QUESTION = Path(__file__).with_name("answers.py")
SETTING = "sglang_server.python"
REMEDY = "Pass --sglang-python with the interpreter of an environment that has sglang."
ASK_TIMEOUT_S = 60.0
ASK_FLAGS_TIMEOUT_S = 300.0  # imports sglang


@dataclass(frozen=True)
class InstalledSglang:
    """Describes one SGLang: its version and flags.

    ``torch_version`` is None where no interpreter was asked, ``router_version`` where it has no sglang-router."""

    version: str
    torch_version: str | None
    flags: Mapping[str, SglangFlag]
    router_version: str | None = None

    def flag(self, dest: str) -> SglangFlag | None:
        return self.flags.get(dest)

    def by_spelling(self) -> dict[str, SglangFlag]:
        return {name: flag for flag in self.flags.values() for name in flag.spellings}


def checked_in() -> InstalledSglang:
    """Return the flags of the checked-in table, with the pinned version."""
    return InstalledSglang(sglang_version(), None, sglang_flags())


@cache
def installed_in(python: str) -> InstalledSglang:
    """Ask the interpreter; raises ConfigError where it has no SGLang that answers."""
    data = _ask(python, "flags")
    flags: dict[str, SglangFlag] = {}
    for row in data["flags"]:
        flag = SglangFlag(row["dest"], tuple(row["spellings"]), "str" if row["takes_value"] else "bool")
        if earlier := flags.get(flag.dest):
            flag = replace(flag, spellings=(*earlier.spellings, *flag.spellings))
        flags[flag.dest] = flag
    return InstalledSglang(data["sglang"], data["torch"], flags, data["router"])


def find_release(python: str | None) -> Release:
    """Ask ``python`` (None: this interpreter); the pinned version where it has no SGLang or does not answer."""
    try:
        data = _ask(python or sys.executable)
    except ConfigError:
        return pinned_release()
    return release_of(data["sglang"], torch=data["torch"], model_types=data["model_types"])


def _ask(python: str, *words: str) -> dict[str, Any]:
    """Return the answer of answers.py; raises ConfigError where the interpreter does not run, or has no sglang."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "")}
    try:
        done = subprocess.run(
            [python, "-c", QUESTION.read_text(), *words],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=ASK_FLAGS_TIMEOUT_S if words else ASK_TIMEOUT_S,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        # The command of a TimeoutExpired is a whole script.
        reason = str(error) if isinstance(error, OSError) else f"no answer in {error.timeout:g} s"
        raise ConfigError(SETTING, f"must be a Python that runs: {reason}", python, REMEDY) from None
    answers = [line for line in done.stdout.splitlines() if line.startswith("SLIME_SPEC ")]
    try:
        answer = parse_json_object(answers[-1].removeprefix("SLIME_SPEC "), python) if answers else {}
    except ConfigError:  # of another program, or of one that was ended while it wrote
        answer = {}
    if done.returncode or not isinstance(answer.get("sglang"), str):
        last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise ConfigError(SETTING, f"must have a working sglang: {last}", python, REMEDY)
    return answer
