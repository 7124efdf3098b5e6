"""A job whose task changes while it runs: sums in English sentences, then in Spanish ones, then as JSON."""

from __future__ import annotations

import random
from dataclasses import dataclass

from slime_spec.interfaces import Problem, Task
from slime_spec.tasks.builtin import TASKS, GeneratedTask
from slime_spec.types import Prompt

STEPS_OF_STAGE = 8
PROMPTS_OF_STEP = 8  # rollout.batch_size of the main job


@dataclass(frozen=True)
class Curriculum:
    """Implements Task: each of its stages has the prompts of so many steps, and the last those that follow."""

    name: str
    stages: tuple[Task, ...]

    def problem(self, index: int, seed: int) -> Problem:
        return self._stage(index).problem(index, seed)

    def reward(self, problem: Prompt, reply: str) -> float:
        return self._stage(problem.prompt_id).reward(problem, reply)

    def _stage(self, index: int) -> Task:
        return self.stages[min(index // (STEPS_OF_STAGE * PROMPTS_OF_STEP), len(self.stages) - 1)]


def _spanish(rng: random.Random) -> Problem:
    a, b = rng.randint(1, 10), rng.randint(1, 10)
    opening = f"La suma de {a} y {b} es igual a"
    return Problem(f'¿Cuánto es {a} + {b}? Responde con la frase "{opening}" y el número.', str(a + b))


def _json(rng: random.Random) -> Problem:
    a, b = rng.randint(1, 10), rng.randint(1, 10)
    keys = f'{{"first": {a}, "second": {b}, "sum": '
    return Problem(f"What is {a} + {b}? Answer with JSON that begins with {keys}", str(a + b))


CURRICULUM = Curriculum(
    "curriculum",
    (TASKS["sum_sentence"], GeneratedTask("spanish_sentence", _spanish), GeneratedTask("json_object", _json)),
)
