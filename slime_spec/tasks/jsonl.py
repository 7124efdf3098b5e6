"""JsonlTask reads prompts from a data file: a row has a prompt (text or chat), and may have answer, advice, tools."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from slime_spec.config.tree import TaskConfig
from slime_spec.errors import ConfigError
from slime_spec.files import parse_json, shortened
from slime_spec.interfaces import Problem
from slime_spec.tasks.data_file import data_rows
from slime_spec.tasks.rewards import REWARDS, Reward, last_integer, load_reward
from slime_spec.types import Prompt

SETTING = "task.prompt_data"


class JsonlTask:
    """Implements Task: every epoch gives each row once, in an order drawn from (seed, epoch)."""

    def __init__(self, config: TaskConfig) -> None:
        """Read the whole file; raises ConfigError naming the file and the line that is broken."""
        assert config.prompt_data is not None, "JsonlTask is built where prompt_data is set"
        self.name = Path(config.prompt_data).stem
        self._reward: Reward = load_reward("task.reward", config.reward)
        self.rows = _problems(config, integers=self._reward is last_integer)
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def keep(self, rows: Sequence[tuple[str, Problem]]) -> None:
        """Go on with some of ``rows``; called before any problem is taken."""
        self.rows = list(rows)

    def problem(self, index: int, seed: int) -> Problem:
        epoch, position = divmod(index, len(self.rows))
        return self.rows[self._order(seed, epoch)[position]][1]

    def reward(self, problem: Prompt, reply: str) -> float:
        return self._reward(problem, reply)

    def _shuffled(self, seed: int, epoch: int) -> list[int]:
        order = list(range(len(self.rows)))
        random.Random(f"{seed}/{self.name}/{epoch}").shuffle(order)
        return order


def _problems(config: TaskConfig, integers: bool) -> list[tuple[str, Problem]]:
    """Return (place, problem) for every row."""
    path = config.prompt_data
    assert path is not None, "JsonlTask is built where prompt_data is set"
    rows = data_rows(SETTING, path)
    if not rows:
        raise ConfigError(SETTING, "must hold at least one prompt", path, "Put one JSON object on each line.")
    has_own_label_key = config.label_key != TaskConfig().label_key
    for key, setting, what in (
        (config.advice_key, "advice_key", "a text"),
        (config.tool_key, "tool_key", "tools"),
        (config.label_key if has_own_label_key else None, "label_key", "a label"),
    ):
        if key is not None and all(row.get(key) in (None, "", []) for _, row in rows):
            flag = f"--{setting.replace('_', '-')}"
            raise ConfigError(f"task.{setting}", f"no line of {path} has {what} under it", key, f"Correct {flag}.")
    return [(place, _Row(place, row, config).problem(integers)) for place, row in rows]


@dataclass(frozen=True)
class _Row:
    """Reads the values of one row; a value that cannot be used is refused with the row's place."""

    place: str
    values: Mapping[str, Any]
    config: TaskConfig

    def problem(self, integers: bool) -> Problem:
        text, messages = self._prompt(self.config.input_key)
        answer = self._answer(self.config.label_key, integers)
        return Problem(text, answer, self._advice(self.config.advice_key), messages, self._tools(self.config.tool_key))

    def _prompt(self, key: str) -> tuple[str, tuple[Mapping[str, Any], ...]]:
        """Return the prompt's text; of a chat its last text, with the messages."""
        prompt = self._needed(key, "--input-key")
        if prompt and _are_objects(prompt):
            return next((each["content"] for each in reversed(prompt) if isinstance(each.get("content"), str)), ""), (
                tuple(prompt)
            )
        if not isinstance(prompt, str) or not prompt:
            rule = f"{key!r} must be a text that is not empty, or a list of messages"
            raise self._refused(rule, prompt, "Write the user's message.")
        return prompt, ()

    def _answer(self, key: str, integers: bool) -> str:
        """Return the label as text; a function of the user's own may need no label, and then has ""."""
        if self.values.get(key) is None and self.config.reward not in REWARDS:
            return ""
        label = self._needed(key, "--label-key")
        is_number = type(label) is int or (isinstance(label, float) and math.isfinite(label))
        if not is_number and not isinstance(label, str):
            raise self._refused(f"{key!r} must be a text or a number", label, "Write the expected answer.")
        if not integers:
            return str(label)
        if (answer := _integer(label)) is None:
            rule = f"{key!r} must be an integer for the reward last_integer"
            raise self._refused(rule, label, "Pass --rm-type exact, or a function of your own: module:function.")
        return answer

    def _advice(self, key: str | None) -> str:
        """Return the row's advice; a row without any is generated without."""
        advice = self.values.get(key) if key is not None else None
        if advice is None:
            return ""
        if not isinstance(advice, str):
            remedy = "Write a text that the reply will resemble, or leave it out."
            raise self._refused(f"{key!r} must be a text", advice, remedy)
        return advice

    def _tools(self, key: str | None) -> tuple[Mapping[str, Any], ...]:
        """Return the row's tools, which may be written as the text of a JSON list, as slime's data have them."""
        tools = self.values.get(key) if key is not None else None
        if isinstance(tools, str):
            tools = parse_json(tools, f"{self.place}: {key}", remedy="Write [{...}, ...].")
        if tools is not None and not _are_objects(tools):
            raise self._refused(f"{key!r} must be a list of JSON schemas", tools, "Write [{...}, ...].")
        return tuple(tools or ())

    def _needed(self, key: str, flag: str) -> Any:
        if key not in self.values:
            names = shortened(str(sorted(self.values)), 200)
            raise self._refused(
                f"must have the key {key!r}", names, f"Add it, or pass {flag} with the file's own name."
            )
        return self.values[key]

    def _refused(self, rule: str, value: object, remedy: str) -> ConfigError:
        shown = value if isinstance(value, bool | int | float | None) else shortened(str(value))
        return ConfigError(SETTING, f"{self.place}: {rule}", shown, remedy)


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def _integer(label: str | int | float) -> str | None:
    """Return an integer as last_integer reads it; None for another number or text. The number 5.0 is 5."""
    if isinstance(label, float):
        return str(int(label)) if label.is_integer() else None
    try:
        return str(label).strip() if str(int(label)) == str(label).strip().removeprefix("+") else None
    except ValueError:
        return None
