"""An EvalSet is one set of prompts that a run is evaluated on, with the configuration of its prompts and replies.

That configuration is the run's, with the set's prompts and sampling in the places of the run's own. So prompts, rewards
and requests of an evaluation are made by the code that makes a step's.

    run's Config ─┬─► eval.*, and a data set's keys in the file of --eval-config ─► one Config of each set
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import xxhash

from slime_spec.config.schema import Setting, settings
from slime_spec.config.tree import Config, TaskConfig
from slime_spec.config.yaml_file import read_yaml_file
from slime_spec.errors import ConfigError, ConfigErrors
from slime_spec.suggest import did_you_mean

PROMPT_DATA = "eval.prompt_data"
FILE = "eval.config"
PAIRS = "Write --eval-prompt-data NAME FILE, and NAME FILE again for each further set."
# Of a remedy for a run's missing data; an evaluation has its own other choice.
OR_THE_RUNS_OWN = " (a script's PROMPT_DATA), or data=arithmetic for the built-in task"
# A name is a part of metrics' names.
NAME = re.compile(r"[A-Za-z0-9_.+@-]+")
# The settings of an evaluation that stand for one of the run's, by their names in both sections.
COUNTERPARTS: Mapping[str, str] = {
    **{name: f"task.{name}" for name in ("input_key", "label_key", "tool_key", "reward", "reward_key")},
    **{
        name: f"rollout.{name}"
        for name in ("n_samples_per_prompt", "max_prompt_len", "max_response_len", "temperature", "top_p", "top_k")
    },
}
# slime's keys of a data set in the file of --eval-config, with the names here; all others are refused.
KEYS: Mapping[str, str] = {
    "n_samples_per_eval_prompt": "n_samples_per_prompt",
    "rm_type": "reward",
    "custom_rm_path": "reward",
    **{name: name for name in COUNTERPARTS if name not in ("reward", "n_samples_per_prompt")},
}


@dataclass(frozen=True)
class EvalSet:
    """Holds a set's name, the run's configuration with the set's own prompts and sampling, and its problems of a task.

    ``num_problems`` is None for a data file, whose rows are all taken. ``may_lack`` are settings of keys that were
    chosen for training's rows, and under which the set's rows need not have anything.
    """

    name: str
    config: Config
    num_problems: int | None = None
    may_lack: frozenset[str] = frozenset()


def eval_sets(config: Config) -> tuple[EvalSet, ...]:
    """Return the sets of a run in the order in which they were named; reads the file of --eval-config.

    Raises ConfigError for names without a file, names that are no part of a metric's name or come twice, and for what
    the file cannot say.
    """
    asked = config.eval
    sets = [
        *(_of_data(config, name, {"path": path}) for name, path in _pairs(asked.prompt_data)),
        *(_of_data(config, name, keys) for name, keys in _in_file(asked.config)),
        *(_of_task(config, name) for name in asked.tasks),
    ]
    names = [each.name for each in sets]
    for each in sets:
        if not NAME.fullmatch(each.name):
            rule = "a set's name is a part of its metrics' names: letters, digits and _ . + @ -"
            raise ConfigError(PROMPT_DATA, rule, each.name, PAIRS)
        if names.count(each.name) > 1:
            raise ConfigError(PROMPT_DATA, "each set must have a name of its own", each.name, "Name one otherwise.")
        if config.evaluates and each.config.rollout.longest > config.longest:  # engines are sized before this is read
            rule = f"set {each.name}: its longest sequence must be within that of the engines, {config.longest} tokens"
            remedy = f"Pass --eval-max-response-len {each.config.rollout.max_response_len}, the most that sets ask for."
            raise ConfigError(FILE, rule, each.config.rollout.longest, remedy)
    return tuple(sets)


def as_of_evaluation(error: ConfigError, name: str) -> ConfigError:
    """Return an error about a set's own configuration in the words of the evaluation's settings and flags."""
    if isinstance(error, ConfigErrors):
        return ConfigErrors([as_of_evaluation(each, name) for each in error.errors])
    run_settings = {**COUNTERPARTS, "prompt_data": "task.prompt_data", "tasks": "task.names"}
    paths = {path: f"eval.{own}" for own, path in run_settings.items()}
    remedy = error.remedy
    for own, path in run_settings.items():
        for flag in settings()[path].flags:
            remedy = re.sub(rf"{flag}(?![\w-])", settings()[f"eval.{own}"].flags[0], remedy)
    remedy = remedy.replace(OR_THE_RUNS_OWN, ", or --eval-task TASK")
    remedy = remedy.replace("--eval-prompt-data FILE", "--eval-prompt-data NAME FILE")
    return type(error)(paths.get(error.setting, error.setting), f"set {name}: {error.rule}", error.value, remedy)


def _pairs(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return (name, file) for each set; a file alone is named as it is, where slime supposes aime."""
    if len(words) == 1:
        return [(Path(words[0].partition("@[")[0]).stem, words[0])]
    if len(words) % 2:
        raise ConfigError(PROMPT_DATA, "must be pairs of a name and a file", " ".join(words), PAIRS)
    return list(zip(words[::2], words[1::2], strict=True))


def _of_data(config: Config, name: str, keys: Mapping[str, Any]) -> EvalSet:
    task = replace(config.task, names=TaskConfig().names, prompt_data=keys["path"], prompt_data_mix=(), advice_key=None)
    has_tool_key = keys.get("tool_key", config.eval.tool_key) is not None
    may_lack = frozenset({"metadata_key"} if has_tool_key else {"metadata_key", "tool_key"})
    return EvalSet(name, _with_own_settings(replace(config, task=task), name, keys), may_lack=may_lack)


def _of_task(config: Config, name: str) -> EvalSet:
    task = replace(config.task, names=(name,), prompt_data=None, prompt_data_mix=())
    shown = name.rpartition(":")[2]
    return EvalSet(shown, _with_own_settings(replace(config, task=task), shown, {}), config.eval.num_prompts)


def _with_own_settings(config: Config, name: str, keys: Mapping[str, Any]) -> Config:
    """Return the configuration with the set's seed, and what is said of evaluations or of the set where it is said."""
    values: dict[str, dict[str, Any]] = {"task": {}, "rollout": {}}
    for own, path in COUNTERPARTS.items():
        value = keys.get(own, getattr(config.eval, own))
        section, leaf = path.split(".")
        if value is not None:
            values[section][leaf] = value
    rollout = replace(
        config.rollout, **values["rollout"], over_sampling_batch_size=None, partial_rollout=False, routing_replay=False
    )
    if rollout.max_context_len is not None:  # of a function's turns: of the run's, unless the set asks for more
        least = rollout.max_prompt_len + rollout.max_response_len
        rollout = replace(rollout, max_context_len=max(rollout.max_context_len, least))
    return replace(
        config,
        run=replace(config.run, seed=eval_seed(config.run.seed, name)),
        task=replace(config.task, **values["task"]),
        rollout=rollout,
    )


def eval_seed(run_seed: int, name: str) -> int:
    """Return the seed of a set's problems and samples: the same at every evaluation, and none of training's."""
    return xxhash.xxh3_64_intdigest(f"{run_seed}/eval/{name}".encode()) >> 33


def _in_file(path: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, own settings) of the data sets in a file like slime's, whose defaults are laid under each."""
    if path is None:
        return
    remedy = "Write eval: {datasets: [{name: NAME, path: FILE}]}."
    data = read_yaml_file(Path(path), remedy)
    data = data.get("eval", data)
    listed = data.get("datasets") if isinstance(data, dict) else None
    if isinstance(listed, dict):
        are_sets = all(isinstance(each, dict | None) for each in listed.values())
        listed = [{"name": name, **(each or {})} for name, each in listed.items()] if are_sets else None
    defaults = data.get("defaults") or {} if isinstance(data, dict) else {}
    are_mappings = isinstance(listed, list) and all(isinstance(each, dict) for each in (*listed, defaults))
    if not listed or not are_mappings:
        raise ConfigError(FILE, "must have a list of mappings under datasets", path, remedy)
    assert isinstance(listed, list), "seen above"
    for each in listed:
        for key in ("name", "path"):
            if not isinstance(each.get(key), str):
                raise ConfigError(FILE, f"{path}: each data set must have a {key}", each, remedy)
        yield each["name"], {"path": each["path"], **_own(path, {**defaults, **each})}


def _own(path: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return a data set's settings by their names here, each checked as the setting that it stands for."""
    own: dict[str, Any] = {}
    for key, value in keys.items():
        if key in ("name", "path"):
            continue
        if key not in KEYS:
            hint = did_you_mean(str(key), [*KEYS, "name", "path"])
            rule = f"{path}: {key} is no key of a data set here"
            raise ConfigError(FILE, rule, value, f"{hint}Known are name, path, {', '.join(KEYS)}.")
        setting: Setting = settings()[f"eval.{KEYS[key]}"]
        try:
            own[KEYS[key]] = setting.check(value)
        except ConfigError as error:
            raise ConfigError(FILE, f"{path}: {key} {error.rule}", value, "Correct the file.") from None
    return own


def given_flags(config: Config) -> list[str]:
    """Return the flags of evaluations that are not at their defaults, but for the interval."""
    own = (each for each in settings().values() if each.node == "eval" and each.path != "eval.interval")
    return [each.flags[0] for each in own if attrgetter(each.path)(config) != each.default]
