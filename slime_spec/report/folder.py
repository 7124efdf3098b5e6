"""This module reads a run's folder for a report: metrics, settings, samples, and whether the run still goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from slime_spec.algorithms import ALGORITHMS, NONE
from slime_spec.config.schema import settings
from slime_spec.config.yaml_file import read_yaml_file
from slime_spec.errors import ConfigError
from slime_spec.files import read_json_object, read_text
from slime_spec.folder_lock import is_held
from slime_spec.metrics.jsonl import FILE as METRICS
from slime_spec.metrics.jsonl import read_metrics
from slime_spec.metrics.summary import Row
from slime_spec.report.samples import ShownSample, ends_of_samples

PACKAGES = ("torch", "megatron-core", "ray", "sglang", "transformers")  # that a run's numbers depend on
NO_DRAFT, FROZEN, ONLINE, TEXT_DRAFT = "no draft", "frozen draft", "online draft", "draft of text"


@dataclass(frozen=True)
class ReportedRun:
    """Holds what a report says of one run.

    ``rows`` are the lines of metrics.jsonl by step, each step once; ``settings`` have every setting of config.yaml by
    its path; ``samples`` are a few of the first and of the last step, empty where the run saved none.
    """

    name: str
    path: Path
    rows: Sequence[Row]
    settings: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[Sequence[ShownSample]] = ()
    command: str = ""
    versions: Mapping[str, Any] = field(default_factory=dict)
    is_running: bool = False

    @cached_property
    def steps(self) -> list[int]:
        return [int(row["step"] or 0) for row in self.rows]

    @cached_property
    def names(self) -> list[str]:
        """Return the names of all metrics that the run has, in the order in which they first came."""
        return [name for name in dict.fromkeys(name for row in self.rows for name in row) if name != "step"]

    def points(self, name: str) -> list[tuple[int, float | None]]:
        """Return (step, value) for every step that has the metric; None stands for a value that was not finite."""
        return [(step, row[name]) for step, row in zip(self.steps, self.rows, strict=True) if name in row]

    @property
    def num_steps_wanted(self) -> int | None:
        wanted = self.settings.get("run.num_rollout")
        return wanted if type(wanted) is int else None

    @property
    def status(self) -> str:
        """Return how far the run is: ``17 of 25 steps, running``."""
        done, wanted = self.steps[-1] + 1 if self.steps else 0, self.num_steps_wanted
        if wanted is not None:  # a row after the last step has the evaluation of the end
            done = min(done, wanted)
        text = f"{done} steps" if wanted is None else f"{done} of {wanted} steps"
        if self.is_running:
            return f"{text}, running"
        return f"{text}, finished" if wanted is not None and done >= wanted else f"{text}, not running"

    @property
    def environment(self) -> list[str]:
        """Return what the run ran with, of what versions.json tells: ``["Python 3.11.2", "torch 2.13.0"]``."""
        packages, git = self.versions.get("packages"), self.versions.get("git")
        facts = [f"Python {self.versions['python']}"] if "python" in self.versions else []
        if isinstance(packages, dict):
            facts += [f"{name} {packages[name]}" for name in PACKAGES if name in packages]
        if isinstance(git, dict):
            facts.append(f"revision {git.get('revision')}{' with local changes' if git.get('dirty') else ''}")
        return facts

    @property
    def draft_kind(self) -> str | None:
        """Return what drafts in the run and whether it learns; None where the settings do not tell."""
        algorithm = ALGORITHMS.get(str(self.settings.get("speculative.algorithm")))
        if algorithm is None:
            return None
        if algorithm == NONE:
            return NO_DRAFT
        if not algorithm.has_weights:
            return TEXT_DRAFT
        trains = self.settings.get("draft_training.enable") and self.settings.get("run.mode") != "rollout_only"
        return ONLINE if trains and self.settings.get("draft_training.lr") != 0 else FROZEN


def read_runs(paths: Sequence[Path]) -> list[ReportedRun]:
    """Return the runs of these folders, each under a name of its own; raises ConfigError for a folder that is none."""
    names = distinct_names(paths)
    return [read_run(path, name) for path, name in zip(paths, names, strict=True)]


def read_run(path: Path, name: str, is_running: bool | None = None) -> ReportedRun:
    """Return the run of a folder, or of its metrics.jsonl; ``is_running`` says so where the caller is the run itself.

    A folder whose run has finished no step yet is a run without rows.
    """
    folder = path if path.is_dir() else path.parent
    metrics = folder / METRICS if path.is_dir() else path
    if not metrics.is_file() and not (folder / "config.yaml").is_file():
        rule = "must be the folder of a run (with a config.yaml or metrics.jsonl), or its metrics.jsonl"
        raise ConfigError("slime-spec report", rule, str(path), "Pass runs/NAME.")
    return ReportedRun(
        name=name,
        path=folder.absolute(),
        rows=read_metrics(metrics) if metrics.is_file() else (),
        settings=_settings(folder / "config.yaml"),
        samples=ends_of_samples(folder / "samples.jsonl"),
        command=_text(folder / "command.txt"),
        versions=read_json_object(versions) if (versions := folder / "versions.json").is_file() else {},
        is_running=is_held(folder) if is_running is None else is_running,
    )


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return the last part of each path, and as many more as it takes to tell them apart; a path twice is numbered."""
    whole = [(path if path.suffix != ".jsonl" else path.parent).absolute().parts for path in paths]
    for depth in range(1, max(map(len, whole), default=1) + 1):
        names = [os.sep.join(parts[-depth:]) for parts in whole]
        if len(set(names)) == len(set(whole)):
            break
    return [
        name if names.count(name) == 1 else f"{name} ({names[:at].count(name) + 1})" for at, name in enumerate(names)
    ]


def _settings(path: Path) -> dict[str, Any]:
    """Return the settings of a configuration file by path; also those of another version, unchecked."""
    if not path.is_file():
        return {}
    return dict(_leaves(read_yaml_file(path)))


def _leaves(data: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    known = settings()
    for node, values in data.items():
        for leaf, value in values.items() if isinstance(values, Mapping) else ():
            path = f"{node}.{leaf}"
            is_tuple = path in known and known[path].is_tuple and isinstance(value, list)
            yield path, tuple(value) if is_tuple else value


def _text(path: Path) -> str:
    return read_text(path) if path.is_file() else ""
