"""Turns say which task gives a prompt: tasks take turns in proportion to their weights, by the prompt's id alone."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

from slime_spec.errors import ConfigError

MOST_TURNS = 100_000  # of one cycle


class Turns:
    """Gives every prompt id its task and the task's own index: ``Turns((3, 1)).at(5) == (0, 4)``.

    In each cycle of turns a task has exactly its weight's share, spread evenly; equal weights take turns in order.
    """

    def __init__(self, weights: Sequence[Fraction | int]) -> None:
        """Raise ConfigError for weights that only a very long cycle keeps exactly."""
        scale = lcm(*(Fraction(weight).denominator for weight in weights))
        shares = [int(weight * scale) for weight in weights]
        total = sum(shares)
        if total > MOST_TURNS:
            rule = f"weights must repeat after at most {MOST_TURNS} prompts, these take {total}"
            shown = ", ".join(map(str, weights))
            raise ConfigError("task.prompt_data_mix", rule, shown, "Round them, e.g. 0.7 and 0.3.")
        self._shares = shares
        self._turns: list[tuple[int, int]] = []  # (task, how many turns it had before in the cycle)
        credit, had = [0] * len(shares), [0] * len(shares)
        for _ in range(total):
            credit = [each + share for each, share in zip(credit, shares, strict=True)]
            task = credit.index(max(credit))
            credit[task] -= total
            self._turns.append((task, had[task]))
            had[task] += 1

    def at(self, prompt_id: int) -> tuple[int, int]:
        """Return the position of the prompt's task, and the task's index of its problem."""
        cycle, turn = divmod(prompt_id, len(self._turns))
        task, before = self._turns[turn]
        return task, cycle * self._shares[task] + before

    def first_of_each(self) -> list[int]:
        """Return the id of each task's first prompt."""
        tasks = [task for task, _ in self._turns]
        return [tasks.index(task) for task in range(len(self._shares))]
