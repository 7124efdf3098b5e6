"""Read flags that the installed SGLang has and the table of the pinned SGLang lacks."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from itertools import takewhile

from slime_spec.launch.flags import OVERRIDE
from slime_spec.sglang.interpreter import installed_in

PREFIX = "--sglang-"
PYTHON = re.compile(r"(?:--sglang[-_]python|sglang_server\.python)=(.+)")


@dataclass(frozen=True)
class NewerFlag:
    """Holds words for the server, and the number of tokens read: ``NewerFlag(("--warp-drive", "9"), num_tokens=2)``."""

    words: tuple[str, ...]
    num_tokens: int


def newer_flag(argv: Sequence[str], position: int) -> NewerFlag | None:
    """Read the unknown flag at ``position`` as the servers spell it; None where the servers do not know it.

    Asks the interpreter of --sglang-python (else this interpreter, if it has sglang), which must import sglang.
    """
    name, has_value, attached = argv[position].partition("=")
    spelling = name.replace("_", "-")
    if not spelling.startswith(PREFIX) or (python := _interpreter(argv)) is None:
        return None
    theirs = f"--{spelling.removeprefix(PREFIX)}"
    flag = installed_in(python).by_spelling().get(theirs)
    if flag is None:
        return None
    if has_value:
        return NewerFlag((theirs, attached), 1)
    values = _values(argv[position + 1 :]) if flag.takes_value else []
    return NewerFlag((theirs, *values), 1 + len(values))


def _values(tokens: Sequence[str]) -> Sequence[str]:
    """Return the values up to the next flag or path=value."""
    return list(takewhile(lambda token: not token.startswith("--") and not OVERRIDE.match(token), tokens))


def _interpreter(argv: Sequence[str]) -> str | None:
    named = None
    for token, following in zip(argv, (*argv[1:], ""), strict=True):
        if found := PYTHON.fullmatch(token):
            named = found[1]
        elif token.replace("_", "-") == "--sglang-python" and following:
            named = following
    return named or (sys.executable if any(distributions(name="sglang")) else None)
