"""A file keeps one step's samples, to train on again or to read: ``--save-debug-rollout-data DIR/{rollout_id}.pt``.

The file is ``torch.save`` of plain types, ``{"rollout_id": 3, "samples": [{...}, ...]}``, read back with
``weights_only=True``: nothing in it is executed. Samples come back exactly as they were, but for objects that a task of
a user's own may give as answers, labels and metadata: numpy's are numbers and lists, and all others are texts.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slime_spec.config.tree import RunConfig
from slime_spec.errors import ConfigError, shown
from slime_spec.routed_experts import RoutedExperts
from slime_spec.types import GeneratedSample, Prompt, Sample, SpecCounters, TurnCounts

PLACEHOLDER = "{rollout_id}"
PLAIN: tuple[type[Any], ...] = (str, int, float, complex, bytes, bytearray)
SAVE = "run.save_debug_rollout_data"
LOAD = "run.load_debug_rollout_data"


def check_rollout_data(run: RunConfig, first_rollout_id: int = 0) -> None:
    """Raise ConfigError, before anything starts, unless every step that is left has its file of samples."""
    if run.load_debug_rollout_data is not None:
        steps = range(first_rollout_id, run.num_rollout)
        for path in dict.fromkeys(_path(run.load_debug_rollout_data, step) for step in steps):
            _existing(path)


def save_rollout(template: str, rollout_id: int, samples: Sequence[Sample]) -> Path:
    """Write one step's samples; the file appears whole or not at all. Raises ConfigError where it cannot be written."""
    path = _path(template, rollout_id)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save({"rollout_id": rollout_id, "samples": [asdict(_plain(sample)) for sample in samples]}, file)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # a RuntimeError: torch's writer met a full disk
        with suppress(OSError):
            partial.unlink()
        rule = f"must be writable: {str(error).partition(chr(10))[0]}"
        raise ConfigError(SAVE, rule, str(path), "Make room on the disk, or save elsewhere.") from None
    return path


def load_rollout(template: str, rollout_id: int) -> list[Sample]:
    """Read one step's samples; raises ConfigError for a file that is missing or not a saved rollout."""
    path = _existing(_path(template, rollout_id))
    try:
        saved = torch.load(path, weights_only=True)
        return [_sample(fields) for fields in saved["samples"]]
    except (OSError, RuntimeError, pickle.UnpicklingError, LookupError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            LOAD, f"must be a saved rollout ({type(error).__name__}: {reason})", str(path), "Save the rollout again."
        ) from None


def _plain(sample: Sample) -> Sample:
    """Return the sample with plain values alone, as reading executes nothing that could make others."""
    prompt = sample.prompt
    label, metadata, answer = (_plain_value(each) for each in (prompt.label, prompt.metadata, prompt.answer))
    return replace(sample, prompt=replace(prompt, label=label, metadata=metadata, answer=answer))


def _plain_value(value: Any) -> Any:
    for kind in PLAIN:
        if isinstance(value, kind):  # also of a class of its own, such as numpy's texts and an IntEnum
            return value if type(value) in (kind, bool) else kind(value)
    if value is None or isinstance(value, torch.Tensor):
        return value
    if isinstance(value, Mapping):
        return {_plain_value(key): _plain_value(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        listed = [_plain_value(each) for each in value]
        return listed if isinstance(value, list) else tuple(listed) if isinstance(value, tuple) else set(listed)
    return _plain_value(value.tolist()) if isinstance(value, np.ndarray | np.generic) else shown(value)


def _path(template: str, rollout_id: int) -> Path:
    return Path(template.replace(PLACEHOLDER, str(rollout_id)))


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ConfigError(
            LOAD,
            "must name a file of each step",
            str(path),
            f"Save one with --save-debug-rollout-data DIR/{PLACEHOLDER}.pt, or lower --num-rollout.",
        )
    if not zipfile.is_zipfile(path):
        raise ConfigError(LOAD, "must be a saved rollout (not a torch.save file)", str(path), "Save the rollout again.")
    return path


def _sample(fields: Mapping[str, Any]) -> Sample:
    response = fields["response"]
    return Sample(
        **{
            **fields,
            "prompt": Prompt(**fields["prompt"]),
            "response": GeneratedSample(
                **{
                    **response,
                    "spec": SpecCounters(**response["spec"]),
                    "routed_experts": _routed(response),
                    "turns": _turns(response),
                }
            ),
        }
    )


def _routed(response: Mapping[str, Any]) -> RoutedExperts | None:
    routed = response.get("routed_experts")
    return None if routed is None else RoutedExperts(**routed)


def _turns(response: Mapping[str, Any]) -> TurnCounts | None:
    turns = response.get("turns")
    return None if turns is None else TurnCounts(**turns)
