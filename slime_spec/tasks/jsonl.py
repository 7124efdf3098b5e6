"""JsonlTask reads prompts from a jsonl file: one object a line, with a prompt (text or chat), answer, advice, tools."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from slime_spec.config.tree import TaskConfig
from slime_spec.errors import ConfigError
from slime_spec.interfaces import Problem
from slime_spec.tasks.rewards import Reward, last_integer, load_reward
from slime_spec.types import Prompt

SETTING = "task.prompt_data"
Refuse = Callable[[str, object, str], ConfigError]


class JsonlTask:
    """Implements Task: every epoch gives each line once, in an order drawn from (seed, epoch)."""

    def __init__(self, config: TaskConfig) -> None:
        """Read the whole file; raises ConfigError naming the file and the line that is broken."""
        assert config.prompt_data is not None, "JsonlTask is built where prompt_data is set"
        self.path = Path(config.prompt_data)
        self.name = self.path.stem
        self._reward: Reward = load_reward("task.reward", config.reward)
        self.lines = _problems(self.path, config, integers=self._reward is last_integer)
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def problem(self, index: int, seed: int) -> Problem:
        epoch, position = divmod(index, len(self.lines))
        return self.lines[self._order(seed, epoch)[position]][1]

    def reward(self, problem: Prompt, reply: str) -> float:
        return self._reward(problem, reply)

    def _shuffled(self, seed: int, epoch: int) -> list[int]:
        order = list(range(len(self.lines)))
        random.Random(f"{seed}/{self.name}/{epoch}").shuffle(order)
        return order


def _problems(path: Path, config: TaskConfig, integers: bool) -> list[tuple[int, Problem]]:
    """Return (line number, problem) for every line that is not blank."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            SETTING, f"must be a readable file: {error.strerror}", str(path), "Pass --prompt-data FILE.jsonl."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(SETTING, f"must be UTF-8 text: {error}", str(path), "Convert the file to UTF-8.") from None
    problems: list[tuple[int, Problem]] = []
    # Not splitlines(): JSON strings may hold U+2028 and the like, which end no jsonl line.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            problems.append((number, _problem(line, f"{path}:{number}", config, integers)))
    if not problems:
        raise ConfigError(SETTING, "must hold at least one prompt", str(path), "Put one JSON object on each line.")
    if config.advice_key is not None and not any(problem.advice for _, problem in problems):
        raise ConfigError(
            "task.advice_key", f"no line of {path} has a text under it", config.advice_key, "Correct --advice-key."
        )
    if config.tool_key is not None and not any(problem.tools for _, problem in problems):
        raise ConfigError(
            "task.tool_key", f"no line of {path} has tools under it", config.tool_key, "Correct --tool-key."
        )
    return problems


def _problem(line: str, where: str, config: TaskConfig, integers: bool) -> Problem:
    def refuse(rule: str, value: object, remedy: str) -> ConfigError:
        return ConfigError(SETTING, f"{where}: {rule}", value, remedy)

    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise refuse(f"must be valid JSON: {error.msg} at column {error.colno}", _cut(line), "Mend the line.") from None
    if not isinstance(row, dict):
        raise refuse("must be a JSON object", _cut(line), "Write {...} with a prompt and an answer.")
    for key, flag in ((config.input_key, "--input-key"), (config.label_key, "--label-key")):
        if key not in row:
            raise refuse(f"must have the key {key!r}", sorted(row), f"Add it, or pass {flag} with the file's own name.")
    text, label = row[config.input_key], row[config.label_key]
    messages: tuple[Mapping[str, Any], ...] = ()
    if text and _are_objects(text):
        messages = tuple(text)
        text = next((each["content"] for each in reversed(text) if isinstance(each.get("content"), str)), "")
    elif not isinstance(text, str) or not text:
        rule = f"{config.input_key!r} must be a text that is not empty, or a list of messages"
        raise refuse(rule, text, "Write the user's message.")
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        raise refuse(f"{config.label_key!r} must be a text or a number", label, "Write the expected answer.")
    if integers and not _is_integer(label):
        raise refuse(
            f"{config.label_key!r} must be an integer for the reward last_integer", label, "Pass --rm-type exact."
        )
    tools = row.get(config.tool_key) if config.tool_key is not None else None
    if tools is not None and not _are_objects(tools):
        raise refuse(f"{config.tool_key!r} must be a list of JSON schemas", tools, "Write [{...}, ...].")
    return Problem(text, str(label), _advice(row, config.advice_key, refuse), messages, tuple(tools or ()))


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def _advice(row: dict[str, Any], key: str | None, refuse: Refuse) -> str:
    """Return the row's advice; a row without any is generated without."""
    advice = row.get(key) if key is not None else None
    if advice is None:
        return ""
    if not isinstance(advice, str):
        raise refuse(f"{key!r} must be a text", advice, "Write a text that the reply will resemble, or leave it out.")
    return advice


def _is_integer(label: Any) -> bool:
    try:
        return str(int(label)) == str(label).strip().removeprefix("+")
    except ValueError:
        return False


def _cut(line: str) -> str:
    return line if len(line) <= 80 else line[:77] + "..."
