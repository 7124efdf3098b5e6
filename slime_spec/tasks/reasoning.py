"""A ReasoningTask draws the problems of one of reasoning-gym's data sets, and rewards replies as the library does."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS
from reasoning_gym.utils import extract_answer

from slime_spec.interfaces import Problem, unknown_choice
from slime_spec.types import Prompt

# A data set draws its problem i from its seed + i, but some draw all of them when they are made: so many at once.
BLOCK = 1_000


class ReasoningTask:
    """Implements Task. E.g. ``ReasoningTask("leg_counting").problem(7, seed=0)``"""

    def __init__(self, name: str) -> None:
        """Raise ConfigError for a data set that the library does not have."""
        if name not in DATASETS:
            raise unknown_choice("task.names", [f"reasoning_gym:{each}" for each in DATASETS], f"reasoning_gym:{name}")
        self.name = name

    def problem(self, index: int, seed: int) -> Problem:
        entry = _entry(self.name, seed, index)
        where = {"reasoning_gym": self.name, "seed": seed, "index": index}
        return Problem(entry["question"], str(entry["answer"] or ""), metadata=where)

    def reward(self, prompt: Prompt, reply: str) -> float:
        """Return the library's score of what the reply has in its last <answer> tag, or of the whole reply."""
        where = prompt.metadata
        given = extract_answer(reply)
        entry = _entry(self.name, where["seed"], where["index"])
        return float(_data_set(self.name, where["seed"]).score_answer(reply.strip() if given is None else given, entry))


@lru_cache(maxsize=4)
def _data_set(name: str, seed: int) -> Any:
    return reasoning_gym.create_dataset(name, seed=seed, size=BLOCK)


@lru_cache(maxsize=1024)
def _entry(name: str, seed: int, index: int) -> Mapping[str, Any]:
    block, place = divmod(index, BLOCK)
    entry: Mapping[str, Any] = _data_set(name, seed + block * BLOCK)[place]
    return entry
