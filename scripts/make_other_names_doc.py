"""Write the tables of docs/coming-from-verl-and-trl.md from the code: ``python scripts/make_other_names_doc.py``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from slime_spec.launch.others.names import counterparts

DOC = Path(__file__).resolve().parent.parent / "docs" / "coming-from-verl-and-trl.md"
BEGIN, END = "<!-- names: scripts/make_other_names_doc.py -->\n", "<!-- /names -->"


def with_tables(document: str) -> str:
    """Return the page with the tables of today."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    parts = (_table("verl"), _table("TRL"), _without("verl"), _without("TRL"))
    return f"{before}{BEGIN}" + "".join(f"{line}\n" for part in parts for line in (*part, "")) + f"{END}{after}"


def _table(trainer: str) -> Iterator[str]:
    yield f"## {trainer}'s names"
    yield ""
    yield "| there | here | |"
    yield "|---|---|---|"
    for each in counterparts().values():
        if each.trainer == trainer and each.flags:
            yield f"| `{each.name}` | {', '.join(f'`{flag}`' for flag in each.flags)} | {each.note} |"


def _without(trainer: str) -> Iterator[str]:
    yield f"## What of {trainer}'s has no counterpart"
    yield ""
    yield "| there | because |"
    yield "|---|---|"
    for each in counterparts().values():
        if each.trainer == trainer and not each.flags:
            yield f"| `{each.name}` | {each.note} |"


if __name__ == "__main__":
    DOC.write_text(with_tables(DOC.read_text(encoding="utf-8")), encoding="utf-8")
