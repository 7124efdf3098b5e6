"""Texts of a shell script that keep what only the shell knows: ``/data/${MODEL}`` where nobody says what MODEL is.

An open part stands between two marks and is shell source, so that a text can be written into a shell command again.
"""

from __future__ import annotations

import re
import shlex

OPEN, CLOSE = "\ue000", "\ue001"  # of Unicode's private use: no script has them
PART = re.compile(f"{OPEN}(.*?){CLOSE}", re.DOTALL)


def open_part(source: str) -> str:
    """Return the text of shell source that is not evaluated: ``${NAME}`` or ``$(command)``."""
    return f"{OPEN}{source}{CLOSE}"


def open_parts(text: str) -> list[str]:
    """Return the shell sources that the text keeps, in order."""
    return PART.findall(text)


def shown(text: str) -> str:
    """Return the text as the script has it."""
    return PART.sub(lambda found: found[1], text)


def quoted(text: str) -> str:
    """Return the text as a word of a shell command, which evaluates what is open.

    ``quoted("/data/" + open_part("${MODEL}"))`` is ``/data/"${MODEL}"``.
    """
    if not text:
        return "''"
    pieces = PART.split(text)  # literal, source, literal, source, ..., literal
    return "".join(
        f'"{piece}"' if index % 2 else shlex.quote(piece) if piece else "" for index, piece in enumerate(pieces)
    )


def fields(text: str) -> list[str]:
    """Split a text that the shell expanded without quotes; an open part is one field with what touches it."""
    kept: list[str] = []

    def hidden(found: re.Match[str]) -> str:
        kept.append(found[0])
        return f"{OPEN}{len(kept) - 1}{CLOSE}"

    words = PART.sub(hidden, text).split()
    return [PART.sub(lambda found: kept[int(found[1])], word) for word in words]
