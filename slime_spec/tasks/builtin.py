"""These built-in verifiable tasks are small enough for a 135M model to learn by GRPO within tens of steps."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from slime_spec.interfaces import Problem
from slime_spec.tasks.counting import count_problem, share_counted
from slime_spec.tasks.rewards import Reward, last_integer
from slime_spec.types import Prompt

Draw = Callable[[random.Random], Problem]


@dataclass(frozen=True)
class GeneratedTask:
    """Implements Task: its problems are drawn from a generator seeded by (seed, name, index)."""

    name: str
    draw: Draw
    score: Reward = last_integer

    def problem(self, index: int, seed: int) -> Problem:
        return self.draw(random.Random(f"{seed}/{self.name}/{index}"))

    def reward(self, problem: Prompt, reply: str) -> float:
        return self.score(problem, reply)


def _addends(rng: random.Random) -> tuple[int, int]:
    return rng.randint(1, 10), rng.randint(1, 10)


def _two_digit_numbers(rng: random.Random) -> list[int]:
    return rng.sample(range(10, 100), 4)


def _add10(rng: random.Random) -> Problem:
    a, b = _addends(rng)
    return Problem(f"What is {a} + {b}? Answer with just the number.", str(a + b))


def _max4(rng: random.Random) -> Problem:
    numbers = _two_digit_numbers(rng)
    listed = ", ".join(map(str, numbers))
    return Problem(f"Which is the largest number: {listed}? Answer with just the number.", str(max(numbers)))


def _sum_sentence(rng: random.Random) -> Problem:
    a, b = _addends(rng)
    opening = f"The sum of {a} and {b} is"
    return Problem(f'What is {a} + {b}? Answer with the sentence "{opening}" and the number.', str(a + b))


def _max_sentence(rng: random.Random) -> Problem:
    numbers = _two_digit_numbers(rng)
    listed = ", ".join(map(str, numbers))
    asked = (
        f'Which is the largest number: {listed}? Answer with the sentence "The largest of {listed} is" and the number.'
    )
    return Problem(asked, str(max(numbers)))


TASKS = {
    task.name: task
    for task in (
        GeneratedTask("add10", _add10),
        GeneratedTask("max4", _max4),
        GeneratedTask("sum_sentence", _sum_sentence),
        GeneratedTask("max_sentence", _max_sentence),
        GeneratedTask("count", count_problem, share_counted),
    )
}
# Names that stand for several tasks in turn. The sentences repeat the question, so prompt lookup finds text to copy.
SUITES = {"arithmetic": ("add10", "max4"), "arithmetic_sentences": ("sum_sentence", "max_sentence")}
