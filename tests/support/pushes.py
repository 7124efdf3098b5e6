"""Pushes made by hand: what a trainer would send to an engine in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from slime_spec.weights.manifest import Manifest, Side, combined_checksum, meta_of, tensor_checksum
from slime_spec.weights.push import BeginPush, CommitPush, PushBucket, PushMessage, bucketed


class DirectTransport:
    """Hands tensors over in memory."""

    def publish(self, tensors: Sequence[torch.Tensor]) -> Any:
        return list(tensors)

    def receive(self, bucket: PushBucket) -> list[torch.Tensor]:
        return bucket.handle


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
    metas = tuple(meta_of(name, tensor) for name, tensor in weights.items())
    messages: list[PushMessage] = [BeginPush(Manifest(side, version, metas))]
    for index, bucket in enumerate(bucketed(weights.items(), bucket_bytes)):
        _, tensors = zip(*bucket, strict=True)
        tensor_metas = tuple(meta_of(n, t) for n, t in bucket)
        checksums = tuple(map(tensor_checksum, tensors))
        messages.append(PushBucket(version, index, tensor_metas, checksums, DirectTransport().publish(tensors)))
    messages.append(CommitPush(version, checksum_of(weights)))
    return messages


def checksum_of(weights: Mapping[str, torch.Tensor]) -> str:
    return combined_checksum((name, tensor_checksum(tensor)) for name, tensor in weights.items())
