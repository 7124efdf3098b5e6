"""A run takes one file from each group of conf/: ``speculative=eagle3_tree model=llama3.1_8b``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import slime_spec
from slime_spec.config.task import TaskConfig
from slime_spec.config.task_checks import OF_DATA
from slime_spec.errors import ConfigError
from slime_spec.suggest import did_you_mean

EXPERIMENT = "experiment"  # it chooses files of the other groups, and may be a path or absent
DATA, TOY = "data", "arithmetic"  # the group of prompts and rewards, and its choice without a file
SOURCES = ("task.names", "task.prompt_data", "task.prompt_data_mix")  # of which a run has one
GROUPS = (EXPERIMENT, "model", "speculative", "cluster", DATA)


def conf_dir() -> Path:
    """Return the shipped conf/: inside the installed package, or beside the package in a checkout."""
    package = Path(slime_spec.__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


@cache
def choices(group: str) -> tuple[str, ...]:
    """Return the names that ``group=NAME`` accepts."""
    return tuple(sorted(path.name.removesuffix(".yaml") for path in (conf_dir() / group).glob("*.yaml")))


def check_choice(group: str, name: str) -> str:
    """Return the name; raises ConfigError for a name that the group does not have."""
    if name in choices(group) or (group == EXPERIMENT and is_path(name)):
        return name
    names = ", ".join(choices(group))
    rule = f"must be a .yaml file or one of {names}" if group == EXPERIMENT else f"must be one of {names}"
    remedy = "Pass --config NAME or --config PATH.yaml." if group == EXPERIMENT else f"Pass {group}=NAME."
    raise ConfigError(group, rule, name, did_you_mean(name, choices(group)) + remedy)


def is_path(experiment: str) -> bool:
    """Return whether ``--config`` names a file of the user's own rather than one of conf/experiment."""
    return experiment.endswith((".yaml", ".yml")) or "/" in experiment


def one_source(groups: Mapping[str, str], settings: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Add to a command line that names tasks, or a file of prompts, that an experiment's own source is left out.

    With ``--task max4`` an experiment's file of prompts and its reward are left out, with ``--prompt-data FILE`` its
    tasks.
    """
    named = {name for name in SOURCES if settings.get(name)}
    if named == {"task.names"}:
        # Of a user's own file, too, which stands in an experiment's place; who says there is no file says what else.
        names = () if "task.prompt_data" in settings else ("prompt_data", "prompt_data_mix", *OF_DATA)
        of_data = {f"task.{name}": getattr(TaskConfig(), name) for name in names}
        return {DATA: TOY, **groups}, {**of_data, **settings}
    others = {name: getattr(TaskConfig(), name.removeprefix("task.")) for name in SOURCES} if named else {}
    return dict(groups), {**others, **settings}
