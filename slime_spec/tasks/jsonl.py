"""JsonlTask reads prompts from data: a row has a prompt (text or chat), and may have an answer, tools, metadata."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from slime_spec.config.tree import TaskConfig
from slime_spec.errors import ConfigError, raise_all
from slime_spec.files import parse_json, shortened
from slime_spec.interfaces import Problem
from slime_spec.tasks.data_file import data_rows
from slime_spec.tasks.judge import DATA_SOURCE, ROW_REWARD
from slime_spec.tasks.mix import DataSource
from slime_spec.tasks.rewards import find_reward, is_named, load_named
from slime_spec.types import Prompt


@dataclass(frozen=True)
class UsualKeys:
    """Names the setting of a key, and what others' data (verl's, TRL's, those of the hub) call it, likeliest first."""

    setting: str
    names: tuple[str, ...]


PROMPT_KEYS = UsualKeys("input_key", ("prompt", "messages", "question", "problem", "input", "instruction", "query"))
LABEL_KEYS = UsualKeys(
    "label_key",
    ("label", "answer", "reward_model.ground_truth", "ground_truth", "solution", "target", "expected_answer"),
)
PlacedProblem = tuple[str, Problem]
Choose = Callable[[DataSource, Iterable[PlacedProblem]], list[Problem]]


def every_problem(source: DataSource, placed: Iterable[PlacedProblem]) -> list[Problem]:
    """Choose every problem of a source."""
    return [problem for _, problem in placed]


class JsonlTask:
    """Implements Task: every epoch gives each row once, in an order drawn from (seed, epoch), or in the file's.

    The order is slime's for the same seed; ``problems`` are in the file's.
    """

    def __init__(self, config: TaskConfig, source: DataSource, choose: Choose = every_problem) -> None:
        """Read all the data, and keep the problems that ``choose`` takes; raises ConfigError for a row that is broken.

        ``choose`` goes through the problems once, as they are read.
        """
        self.name, self.path = source.name, source.path
        self.absent_keys = frozenset[str]()
        self.reward_names = set[str]()
        self._config = config
        self.problems = choose(source, self._read(source))
        _check_rewards(config, self.reward_names)
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        return len(self.problems)

    def problem(self, index: int, seed: int) -> Problem:
        epoch, position = divmod(index, len(self.problems))
        return self.problems[self._order(seed, epoch)[position] if self._config.shuffle else position]

    def reward(self, problem: Prompt, reply: str) -> float:
        raise NotImplementedError("data are judged by name, in the source of prompts")

    def _shuffled(self, seed: int, epoch: int) -> list[int]:
        order = list(range(len(self.problems)))
        random.Random(seed + epoch).shuffle(order)
        return order

    def _read(self, source: DataSource) -> Iterator[PlacedProblem]:
        absent = _optional_keys(self._config)
        num_rows = 0
        for place, values in data_rows(source.setting, source.path):
            num_rows += 1
            row = _Row(place, values, self._config, source.setting)
            absent -= {setting for setting in absent if row.value(getattr(self._config, setting)) not in (None, "", [])}
            problem, reward_name = row.problem()
            if reward_name:
                self.reward_names.add(reward_name)
            yield place, problem
        if not num_rows:
            rule = "must hold at least one prompt"
            raise ConfigError(source.setting, rule, source.path, "Put one JSON object on each line.")
        self.absent_keys = frozenset(absent)


def check_keys(config: TaskConfig, sources: Sequence[JsonlTask], may_lack: frozenset[str] = frozenset()) -> None:
    """Raise ConfigError for a key that the user chose, and under which no row of any source has anything."""
    for setting in sorted(frozenset.intersection(*(source.absent_keys for source in sources)) - may_lack):
        what = {"advice_key": "a text", "tool_key": "tools", "label_key": "a label"}.get(setting, "an object")
        names = " and ".join(source.path for source in sources)
        rule, flag = f"no line of {names} has {what} under it", f"--{setting.replace('_', '-')}"
        raise ConfigError(f"task.{setting}", rule, getattr(config, setting), f"Correct {flag}, or leave it out.")


def _optional_keys(config: TaskConfig) -> set[str]:
    """Return the settings of keys that the user chose, and that not every row must have."""
    default = TaskConfig()
    names = ("advice_key", "tool_key", "label_key", "metadata_key")
    return {name for name in names if getattr(config, name) not in (None, getattr(default, name))}


def _check_rewards(config: TaskConfig, names: set[str]) -> None:
    """Load every named reward that a row asks for; raises ConfigError where a library or the server's address lacks."""
    for name in sorted(names):
        load_named("task.reward", name)
    asking = [name for name in names if find_reward("task.reward", name).needs_url]
    if asking and config.rm_url is None:
        raise ConfigError(
            "task.rm_url", "must be given for the reward remote_rm", None, "Pass --rm-url http://HOST:PORT."
        )
    if names and not asking and config.rm_url is not None:
        rule = f"is asked by the reward remote_rm, and this run's is {', '.join(sorted(names))}"
        raise ConfigError("task.rm_url", rule, config.rm_url, "Pass --rm-type remote_rm, or drop --rm-url.")


@dataclass(frozen=True)
class _Row:
    """Reads the values of one row; a value that cannot be used is refused with the row's place."""

    place: str
    values: Mapping[str, Any]
    config: TaskConfig
    setting: str

    def problem(self) -> tuple[Problem, str]:
        """Return the row's problem, and the name of its reward where that is a named one, else ""."""
        config = self.config
        metadata, tools = self._metadata(config.metadata_key), self._tools(config.tool_key)
        if tools:
            metadata["tools"] = list(tools)  # where slime's rewards find them
        if isinstance(origin := self.values.get(DATA_SOURCE), str):
            metadata.setdefault(DATA_SOURCE, origin)  # where verl's rewards look
        reward_name = self._reward_name(metadata)
        needs_label = bool(reward_name) and find_reward("task.reward", reward_name).needs_label
        raise_all(self._absent([PROMPT_KEYS, LABEL_KEYS] if needs_label else [PROMPT_KEYS]))
        text, messages = self._prompt(config.input_key)
        answer, label = self._answer(config.label_key, reward_name, needs_label)
        advice = self._advice(config.advice_key)
        return Problem(text, answer, advice, messages, tools, label, metadata), reward_name

    def value(self, key: str | None) -> Any:
        """Return what the row has under ``key``, None for nothing; ``a.b`` is under ``b`` in the object under ``a``."""
        if key is None or key in self.values:
            return None if key is None else self.values[key]
        value: Any = self.values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def _prompt(self, key: str) -> tuple[str, tuple[Mapping[str, Any], ...]]:
        """Return the prompt's text; of a chat its last text, with the messages."""
        prompt = self.value(key)
        if prompt and _are_objects(prompt):
            return next((each["content"] for each in reversed(prompt) if isinstance(each.get("content"), str)), ""), (
                tuple(prompt)
            )
        if not isinstance(prompt, str) or not prompt:
            rule = f"{key!r} must be a text that is not empty, or a list of messages"
            raise self._refused(rule, prompt, "Write the user's message.")
        return prompt, ()

    def _reward_name(self, metadata: Mapping[str, Any]) -> str:
        """Return the named reward of the row: its own, else the run's; "" where a function of the user's judges."""
        if not is_named(self.config.reward):
            return ""
        name = metadata.get(ROW_REWARD) or self.config.reward
        if not isinstance(name, str):
            raise self._refused(f"{ROW_REWARD!r} must be a reward's name", name, "Write a text.")
        if name == self.config.reward:
            find_reward("task.reward", name)
        else:
            find_reward(self.setting, name, f"{self.place}: {ROW_REWARD!r} ")
        return name

    def _answer(self, key: str, reward_name: str, needs_label: bool) -> tuple[str, Any]:
        """Return the label as text and as it is; a reward that needs no label has "" and None where there is none.

        Such a reward takes any JSON value as the label.
        """
        label = self.value(key)
        if label is None and not needs_label:
            return "", None
        is_number = type(label) is int or (isinstance(label, float) and math.isfinite(label))
        if not is_number and not isinstance(label, str):
            if not needs_label:
                return json.dumps(label, default=str), label
            raise self._refused(f"{key!r} must be a text or a number", label, "Write the expected answer.")
        if needs_label and not str(label).strip():  # what every reply contains, or none equals
            rule = f"{key!r} must not be empty for the reward {reward_name}"
            raise self._refused(rule, label, "Write the expected answer, or leave the line out.")
        if reward_name != "last_integer":
            return str(label), label
        if (answer := _integer(label)) is None:
            rule = f"{key!r} must be an integer for the reward last_integer"
            raise self._refused(rule, label, "Pass --rm-type exact, or a function of your own: module:function.")
        return answer, label

    def _metadata(self, key: str | None) -> dict[str, Any]:
        """Return the row's metadata, which may be written as the text of a JSON object."""
        metadata = self.value(key)
        if isinstance(metadata, str) and metadata.lstrip().startswith("{"):
            metadata = parse_json(metadata, f"{self.place}: {key}", remedy="Write {...}.")
        if metadata is not None and not isinstance(metadata, dict):
            remedy = "Write {...}, or name another --metadata-key (null reads none)."
            raise self._refused(f"{key!r} must be an object", metadata, remedy)
        return dict(metadata or {})

    def _advice(self, key: str | None) -> str:
        """Return the row's advice; a row without any is generated without."""
        advice = self.value(key)
        if advice is None:
            return ""
        if not isinstance(advice, str):
            remedy = "Write a text that the reply will resemble, or leave it out."
            raise self._refused(f"{key!r} must be a text", advice, remedy)
        return advice

    def _tools(self, key: str | None) -> tuple[Mapping[str, Any], ...]:
        """Return the row's tools, which may be written as the text of a JSON list, as slime's data have them."""
        tools = self.value(key)
        if isinstance(tools, str):
            tools = parse_json(tools, f"{self.place}: {key}", remedy="Write [{...}, ...].")
        if tools is not None and not _are_objects(tools):
            raise self._refused(f"{key!r} must be a list of JSON schemas", tools, "Write [{...}, ...].")
        return tuple(tools or ())

    def _absent(self, needed: Sequence[UsualKeys]) -> Iterator[ConfigError]:
        """Yield an error for each key that the row must have and has not, with one that others' data have there."""
        for usual in needed:
            key = getattr(self.config, usual.setting)
            if self.value(key) is not None or key in self.values:
                continue
            names = shortened(str(sorted(self.values)), 200)
            perhaps = next((f", perhaps {name}" for name in usual.names if self.value(name) is not None), "")
            flag = f"--{usual.setting.replace('_', '-')}"
            remedy = f"Add it, or pass {flag} with the file's own name{perhaps}."
            yield self._refused(f"must have the key {key!r}", names, remedy)

    def _refused(self, rule: str, value: object, remedy: str) -> ConfigError:
        shown = value if isinstance(value, bool | int | float | None) else shortened(str(value))
        return ConfigError(self.setting, f"{self.place}: {rule}", shown, remedy)


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
