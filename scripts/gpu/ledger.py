"""The ledger of figures from GPUs: each figure's newest value on each card, with what it takes to repeat it.

python scripts/gpu/ledger.py runs/gpu/*.json        enter the reports of a visit into docs/gpu-ledger.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

LEDGER = Path(__file__).resolve().parents[2] / "docs" / "gpu-ledger.json"
OF_A_ROW = ("what", "value", "unit", "reach", "holds")
Ledger = dict[str, dict[str, dict[str, Any]]]  # figure -> card -> entry


def read(path: Path = LEDGER) -> Ledger:
    ledger: Ledger = json.loads(path.read_text())
    return ledger


def entered(ledger: Mapping[str, Mapping[str, dict[str, Any]]], visit: Mapping[str, Any]) -> Ledger:
    """Return the ledger with the rows of a visit's report; what an older visit measured on the same card is replaced.

    Raises ValueError for a rehearsal: figures of a CPU are none of a GPU.
    """
    if visit["device"] != "cuda":
        raise ValueError(f"a rehearsal on {visit['device']} is no visit to a GPU")
    made = {figure: dict(cards) for figure, cards in ledger.items()}
    for part in visit["parts"]:
        for row in part["rows"]:
            made.setdefault(row["id"], {})[visit["card"]] = {
                **{key: row[key] for key in OF_A_ROW},
                **{key: visit[key] for key in ("date", "revision", "versions")},
                **{key: part[key] for key in ("part", "command")},
            }
    return dict(sorted(made.items()))


def in_turn(parts: Iterable[str], ledger: Mapping[str, Mapping[str, dict[str, Any]]], card: str) -> list[str]:
    """Return the parts as a visit to ``card`` takes them: those never measured there, then from the oldest on."""
    newest: dict[str, str] = {}
    for cards in ledger.values():
        if entry := cards.get(card):
            newest[entry["part"]] = max(newest.get(entry["part"], ""), entry["date"])
    return sorted(parts, key=lambda name: newest.get(name, ""))


def main(reports: list[str]) -> int:
    ledger = read()
    for report in reports:
        ledger = entered(ledger, json.loads(Path(report).read_text()))
    LEDGER.write_text(json.dumps(ledger, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
