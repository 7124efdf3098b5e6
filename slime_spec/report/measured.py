"""This module makes tables of what ``slime-spec bench --json`` and ``slime-spec tune --json`` wrote, and shows SVG."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime_spec.errors import ConfigError
from slime_spec.files import read_json_object, read_text
from slime_spec.report.numbers import shown

SUFFIXES = (".json", ".svg")
HOLDS = {True: "yes", False: "NO", None: ""}


@dataclass(frozen=True)
class MeasuredTable:
    """Holds a table of measurements, or a picture of them as a data URL."""

    title: str
    about: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    picture: str = ""


def read_measured(path: Path) -> MeasuredTable:
    """Return the table of a file; raises ConfigError for a file that no command of this project wrote."""
    if path.suffix == ".svg":
        encoded = base64.b64encode(read_text(path).encode()).decode()
        return MeasuredTable(path.name, picture=f"data:image/svg+xml;base64,{encoded}")
    data = read_json_object(path)
    try:
        made = _bench_rows(data) if "rows" in data else _tune_rows(data)
        about = tuple(f"{name}: {data[name]}" for name in ("date", "command") if name in data)
        return MeasuredTable(path.name, about, made[0], tuple(made[1:]))
    except (KeyError, TypeError, AttributeError):
        rule = "must be what slime-spec bench --json or slime-spec tune --json wrote"
        raise ConfigError("slime-spec report", rule, str(path), "Pass such a file, a picture of it or a run.") from None


def _bench_rows(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    made: list[tuple[str, ...]] = [("id", "what", "value", "reach", "holds")]
    for row in data["rows"]:
        made.append((row["id"], row["what"], _figure(row["value"], row["unit"]), row["reach"], HOLDS[row["holds"]]))
    return made


def _tune_rows(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row for each batch: the speed-up of every side, plain decoding's speed, and what tune chose."""
    sides = list(dict.fromkeys(name for batch in data["batches"] for name in batch["speed_ups"]))
    chosen = {verdict["batch"]: verdict for verdict in data["verdicts"]}
    made: list[tuple[str, ...]] = [("sequences at once", "plain tokens/s", *sides, "choice", "flags")]
    for batch in data["batches"]:
        speed_ups = batch["speed_ups"]
        cells = [_figure(speed_ups[side]["median"], "x") if side in speed_ups else "" for side in sides]
        verdict = chosen.get(batch["batch"], {"side": None, "why": "", "flags": ()})
        choice = verdict["side"] or verdict["why"] or "no speculation"
        plain = _figure(batch["off_tokens_per_s"], "")
        made.append((str(batch["batch"]), plain, *cells, choice, " ".join(verdict["flags"])))
    return made


def _figure(value: float | None, unit: str) -> str:
    return "not measured" if value is None else f"{shown(value)} {unit}".strip()
