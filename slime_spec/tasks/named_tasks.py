"""Tasks are found by name: built-in ones, suites, reasoning-gym's, and a user's own as module:attribute."""

from __future__ import annotations

from slime_spec.errors import ConfigError
from slime_spec.interfaces import Task, load, unknown_choice
from slime_spec.tasks.builtin import SUITES, TASKS
from slime_spec.tasks.rewards import load_attribute

SETTING = "task.names"
REASONING_GYM = "reasoning_gym:"


def tasks_named(name: str) -> tuple[Task, ...]:
    """Return the tasks that ``name`` stands for: several for a suite. Raises ConfigError for an unknown name."""
    return tuple(TASKS[member] for member in SUITES[name]) if name in SUITES else (load_task(name),)


def load_task(name: str) -> Task:
    """Return the task ``name``; raises ConfigError for an unknown name, an absent library or what is no task."""
    if name in TASKS:
        return TASKS[name]
    if name.startswith(REASONING_GYM):
        return _reasoning_task(name)
    if ":" not in name:
        raise unknown_choice(SETTING, [*TASKS, *SUITES], name)
    task: Task = load_attribute(SETTING, name)
    absent = [part for part in ("name", "problem", "reward") if not hasattr(task, part)]
    if absent or isinstance(task, type):
        raise ConfigError(
            SETTING,
            "must name an object with name, problem(index, seed) and reward(prompt, reply)",
            name,
            "Name an instance, not its class." if isinstance(task, type) else f"It lacks {', '.join(absent)}.",
        )
    return task


def runs_elsewhere(name: str) -> bool:
    """Return whether the reward of the task ``name`` is no code of this package, and so runs in processes."""
    return ":" in name


def known_tasks() -> str:
    return ", ".join([*TASKS, *SUITES, f"{REASONING_GYM}NAME"])


def _reasoning_task(name: str) -> Task:
    try:
        make = load("slime_spec.tasks.reasoning:ReasoningTask")
    except ImportError as error:
        remedy = "pip install 'slime_spec[reasoning-gym]'."
        raise ConfigError(SETTING, f"needs the library reasoning-gym: {error}", name, remedy) from None
    task: Task = make(name.removeprefix(REASONING_GYM))
    return task
