"""The reference of a KL may be another checkpoint than the policy's own, of the same architecture."""

from __future__ import annotations

from dataclasses import fields

import torch

from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import verify_tensors
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError

REFERENCE = "trainer.ref_load"
LENGTH = "max_position_embeddings"  # of which the run's own longest sequence is checked


def check_reference(config: Config, spec: ModelSpec | None) -> None:
    """Raise ConfigError for a reference whose folder cannot be read, or is of another architecture than the policy.

    ``spec`` is the policy's, None where that cannot be read itself.
    """
    folder = config.trainer.ref_load
    if folder is None or not config.algorithm.needs_reference:
        return
    theirs = ModelSpec.from_folder(folder, REFERENCE)
    if spec is None:
        return
    names = [each.name for each in fields(spec) if each.name != LENGTH]
    different = [name for name in names if getattr(theirs, name) != getattr(spec, name)]
    if different:
        told = ", ".join(
            f"{name} is {getattr(theirs, name)} there and {getattr(spec, name)} here" for name in different
        )
        remedy = (
            "Pass --ref-load of a checkpoint of this architecture, or leave it out: the reference is --hf-checkpoint."
        )
        raise ConfigError(REFERENCE, f"must be of the policy's architecture: {told}", folder, remedy)
    verify_tensors(folder, spec, REFERENCE, dtypes=[getattr(torch, config.trainer.dtype)])
