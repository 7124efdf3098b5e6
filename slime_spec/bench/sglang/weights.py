"""Benchmarks push a checkpoint's weights, or weights that differ from them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from slime_spec.checkpoints.draft_location import locate_draft
from slime_spec.checkpoints.model_files import TargetFiles, draft_files
from slime_spec.checkpoints.tensors import stored_tensors
from slime_spec.config.tree import Config

Weights = Mapping[str, torch.Tensor]


def target_weights(config: Config) -> Weights:
    """Read the checkpoint's weights in the engine's dtype."""
    folder = config.model.hf_checkpoint
    return _stored(folder, TargetFiles.read(folder).shapes, config)


def draft_weights(config: Config) -> Weights:
    """Read the tensors that a push of the draft carries: its own, or the target's MTP layers."""
    folder = config.model.hf_checkpoint
    location, draft = locate_draft(config.speculative, folder), draft_files(config, TargetFiles.read(folder))
    assert location is not None, f"{config.speculative.algorithm} drafts with weights"
    assert draft is not None, "a located draft has files"
    return _stored(location.folder, draft.shapes, config)


def _stored(folder: str, names: Mapping[str, object], config: Config) -> Weights:
    dtype: torch.dtype = getattr(torch, config.engine.dtype)
    return {name: tensor.to(dtype) for name, tensor in stored_tensors(folder, names.__contains__)}


def disturbed(weights: Weights, share: float, seed: int) -> Weights:
    """Return the weights, each changed by about ``share`` of its value."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (tensor * (1 + share * torch.randn(tensor.shape, generator=generator))).to(tensor.dtype)
        for name, tensor in weights.items()
    }
