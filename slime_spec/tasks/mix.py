"""A source of prompts is a file or folder of data with its name and weight; a run may mix several."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from slime_spec.config.tree import TaskConfig
from slime_spec.errors import ConfigError

SETTING = "task.prompt_data_mix"
NAMED = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9_.-]{0,63})=(?P<weight>\d{1,6}(?:\.\d{1,6})?):(?P<path>.+)")


@dataclass(frozen=True)
class DataSource:
    """Names a source of prompts. E.g. ``DataSource("math", Fraction(3), "math.jsonl@[0:100]", "task.prompt_data_mix")``

    ``setting`` is where the user named it.
    """

    name: str
    weight: Fraction
    path: str
    setting: str


def data_sources(config: TaskConfig) -> tuple[DataSource, ...]:
    """Return the sources of a run that reads data; raises ConfigError for a source that is not NAME=WEIGHT:PATH."""
    if config.prompt_data is not None:
        return (DataSource(Path(config.prompt_data).stem, Fraction(1), config.prompt_data, "task.prompt_data"),)
    sources = tuple(map(_source, config.prompt_data_mix))
    names = [source.name for source in sources]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        rule = f"names must be distinct; {', '.join(repeated)} comes twice"
        raise ConfigError(SETTING, rule, config.prompt_data_mix, "Rename one.")
    return sources


def _source(text: str) -> DataSource:
    found = NAMED.fullmatch(text)
    if found is None or not (weight := Fraction(found["weight"])):
        rule = "each must be NAME=WEIGHT:PATH with a weight above 0"
        raise ConfigError(SETTING, rule, text, "E.g. --prompt-data-mix math=3:math.jsonl gsm8k=1:gsm8k.parquet.")
    return DataSource(found["name"], weight, found["path"], SETTING)
