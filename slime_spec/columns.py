"""Lines of the terminal fit it, and 120 columns at most; what a pipe reads fits 120."""

from __future__ import annotations

import shutil
import sys
import textwrap

WIDEST = 120


def columns() -> int:
    """Return how many columns a line on standard error may have."""
    is_terminal = sys.__stderr__ is not None and sys.__stderr__.isatty()
    return min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST) if is_terminal else WIDEST


def wrapped(line: str, width: int = WIDEST, indent: str = "  ") -> list[str]:
    """Return a line as lines of at most ``width`` columns, the later ones indented; no word or fact is broken."""
    return textwrap.wrap(
        line,
        width,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )


def fitted(text: str, width: int = WIDEST, indent: str = "  ") -> str:
    """Return a text of one or more lines with those wrapped that are too long; others stay as they are."""
    return "\n".join(
        part for line in text.split("\n") for part in ([line] if len(line) <= width else wrapped(line, width, indent))
    )
