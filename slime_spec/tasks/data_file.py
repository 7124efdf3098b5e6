"""A data file gives its rows with their places: a jsonl file or a parquet file, whole or a slice as slime writes it."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slime_spec.errors import ConfigError
from slime_spec.files import json_rows

Row = tuple[str, dict[str, Any]]
SLICE = re.compile(r"(?P<path>.+)@\[(?P<start>-?\d{0,18}):(?P<stop>-?\d{0,18})\]")


def data_rows(setting: str, named: str) -> list[Row]:
    """Return (place, row) for every row of the file that ``named`` names; ``file@[2:5]`` takes rows as Python does.

    A place is ``file:line``, for a parquet file ``file:row``, counted from 1. Raises ConfigError for a file or a line
    that cannot be read, and for a parquet file where pyarrow is not installed.
    """
    found = None if os.path.exists(named) else SLICE.fullmatch(named)
    path = Path(named if found is None else found["path"])
    if not os.path.exists(path):
        rule = "must be a readable file: No such file or directory"
        remedy = "Pass --prompt-data FILE.jsonl (a script's PROMPT_DATA), or data=arithmetic for the built-in task."
        raise ConfigError(setting, rule, str(path), remedy)
    rows = list(_parquet_rows(setting, path) if path.suffix == ".parquet" else json_rows(path))
    if found is None:
        return rows
    start, stop = (None if found[end] in ("", "-") else int(found[end]) for end in ("start", "stop"))
    return rows[start:stop]


def _parquet_rows(setting: str, path: Path) -> Iterator[Row]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ConfigError(
            setting, "a parquet file needs pyarrow", str(path), "pip install pyarrow, or convert the file to jsonl."
        ) from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError, NotImplementedError, LookupError) as error:  # what pyarrow's own errors derive from
        raise ConfigError(setting, f"must be a parquet file: {error}", str(path), "Write the file again.") from None
    for number, row in enumerate(rows, start=1):
        yield f"{path}:{number}", _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    """Leave out the keys that are null: a column of parquet has the keys of all rows in each."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
