"""Pushes made by hand: what a trainer would send to an engine in this process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from slime_spec.transports.in_process import InProcessTransport
from slime_spec.weights.checksums import combined_checksum, tensor_checksum
from slime_spec.weights.messages import PushMessage, Side
from slime_spec.weights.run import push_messages

DirectTransport = InProcessTransport


def other_weights(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """A checkpoint's weights, disturbed."""
    return disturbed(load_file(folder / "model.safetensors"), seed)


def disturbed(weights: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}


def push_of(
    weights: Mapping[str, torch.Tensor], version: int, side: Side = "target", bucket_bytes: int = 20_000
) -> list[PushMessage]:
    """A push of ``weights`` in several buckets that separate the parts of fused modules."""
    return list(push_messages(weights, version, side, bucket_bytes, DirectTransport()))


def checksum_of(weights: Mapping[str, torch.Tensor]) -> str:
    return combined_checksum((name, tensor_checksum(tensor)) for name, tensor in weights.items())
