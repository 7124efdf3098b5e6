"""Data give their rows with their places: a jsonl or parquet file, or a folder of parquet files or of datasets.

``PATH@[2:5]`` takes rows as Python's slices do, ``PATH@test`` a split of a folder, ``PATH@test[2:5]`` both.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from slime_spec.config.eval_sets import OR_THE_RUNS_OWN
from slime_spec.errors import ConfigError
from slime_spec.files import json_rows, read_json_object
from slime_spec.interfaces import unknown_choice

Row = tuple[str, dict[str, Any]]
PART = re.compile(
    r"(?P<path>.+)@(?=.)(?P<split>[A-Za-z0-9_][A-Za-z0-9_.-]*)?(?P<slice>\[(?P<start>-?\d{0,18}):(?P<stop>-?\d{0,18})\])?"
)
SHARD = re.compile(r"(?P<split>.+?)-\d{5}-of-\d{5}\.parquet")  # as the hub and `datasets` name them
DEFAULT_SPLIT = "train"
# Of a dataset's folder, and of a folder of splits, both by save_to_disk.
DATASET, SPLITS = "state.json", "dataset_dict.json"


def data_rows(setting: str, named: str) -> Iterator[Row]:
    """Yield (place, row) for every row of the file or folder that ``named`` names, reading as it goes.

    A place is ``file:line``; for a parquet file ``file:row``, for a dataset ``folder:row``, counted from 1. Raises
    ConfigError for a file or a row that cannot be read, for a split that is not there, and for an absent library.
    """
    found = None if os.path.exists(named) else PART.fullmatch(named)
    path = Path(named if found is None else found["path"])
    if not os.path.exists(path):
        rule = "must be a readable file: No such file or directory"
        remedy = f"Pass --prompt-data FILE.jsonl{OR_THE_RUNS_OWN}."
        raise ConfigError(setting, rule, str(path), remedy)
    split = None if found is None else found["split"]
    rows = _rows(setting, path, split)
    if found is None or found["slice"] is None:
        return rows
    start, stop = (None if found[end] in ("", "-") else int(found[end]) for end in ("start", "stop"))
    if (start or 0) < 0 or (stop or 0) < 0:
        return iter(list(rows)[start:stop])
    return islice(rows, start, stop)


def _rows(setting: str, path: Path, split: str | None) -> Iterator[Row]:
    if path.is_dir():
        return _folder_rows(setting, path, split)
    if split is not None:
        raise ConfigError(setting, f"a file has no splits, as folders have: {path}", split, "Write FILE@[0:100].")
    return _parquet_rows(setting, [path]) if path.suffix == ".parquet" else json_rows(path)


def _folder_rows(setting: str, path: Path, split: str | None) -> Iterator[Row]:
    if (path / SPLITS).is_file():
        names = read_json_object(path / SPLITS).get("splits")
        chosen = _chosen_split(setting, path, names if isinstance(names, list) else [], split)
        return _dataset_rows(setting, path / chosen)
    if (path / DATASET).is_file():
        if split is not None:
            raise ConfigError(setting, f"is one dataset, without splits: {path}", split, "Drop the split.")
        return _dataset_rows(setting, path)
    files = sorted(each for each in path.rglob("*.parquet") if each.is_file())
    if not files:
        rule = "a folder must hold parquet files, or datasets as save_to_disk writes them"
        raise ConfigError(setting, rule, str(path), "Pass a jsonl or parquet file, or such a folder.")
    folders = sorted({str(each.parent) for each in files})
    if len(folders) > 1:
        rule = f"its parquet files must be in one folder, they are in {', '.join(folders[:5])}"
        raise ConfigError(setting, rule, str(path), "Name one of them.")
    splits = {each: SHARD.fullmatch(each.name) for each in files}
    by_file = {each: DEFAULT_SPLIT if shard is None else shard["split"] for each, shard in splits.items()}
    chosen = _chosen_split(setting, path, by_file.values(), split)
    return _parquet_rows(setting, [each for each in files if by_file[each] == chosen])


def _chosen_split(setting: str, path: Path, names: Iterable[str], asked: str | None) -> str:
    known = list(dict.fromkeys(names))
    if asked is None and len(known) == 1:
        return known[0]
    chosen = asked or DEFAULT_SPLIT
    if chosen not in known:
        error = unknown_choice(setting, known, chosen)
        raise ConfigError(setting, f"{path}: the split {error.rule}", chosen, f"Write {path}@SPLIT.")
    return chosen


def _parquet_rows(setting: str, paths: Iterable[Path]) -> Iterator[Row]:
    parquet = _library(setting, "pyarrow.parquet", "a parquet file needs pyarrow", next(iter(paths)))
    for path in paths:
        number = 0
        try:
            for batch in parquet.ParquetFile(path).iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", _plain(row)
        except (OSError, ValueError, NotImplementedError, LookupError) as error:  # what pyarrow's errors derive from
            raise ConfigError(setting, f"must be a parquet file: {error}", str(path), "Write the file again.") from None


def _dataset_rows(setting: str, path: Path) -> Iterator[Row]:
    datasets = _library(setting, "datasets", "a folder of save_to_disk needs Hugging Face datasets", path)
    try:
        dataset = datasets.load_from_disk(str(path)).with_format(None)
        for number, row in enumerate(dataset, start=1):
            yield f"{path}:{number}", _plain(row)
    except (OSError, ValueError, NotImplementedError, LookupError, TypeError) as error:
        raise ConfigError(setting, f"must be a dataset: {error}", str(path), "Save it again.") from None


def _library(setting: str, module: str, rule: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        remedy = "pip install 'slime_spec[datasets]', or convert to jsonl."
        raise ConfigError(setting, rule, str(path), remedy) from None


def _plain(value: Any) -> Any:
    """Return a value of a column as JSON would have it: dates and decimals are texts, and null keys are left out.

    A column has the keys of all rows in each.
    """
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, str | int | float | bytes) else str(value)
