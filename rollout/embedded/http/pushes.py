"""Weights that a client sent or named, as pushes to the engine: begin, one bucket, prepare, commit, all or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rollout.embedded.engine import EmbeddedEngine
from slime_spec.errors import PushError
from slime_spec.weights.manifest import Manifest, Side, combined_checksum, meta_of, tensor_checksum
from slime_spec.weights.push import BeginPush, CommitPush, PushBucket, PushReceiver, run_push


class HeldTensors:
    """The WeightTransport of tensors that are in this process already."""

    def publish(self, tensors: Sequence[torch.Tensor]) -> Any:
        return list(tensors)

    def receive(self, bucket: PushBucket) -> list[torch.Tensor]:
        tensors: list[torch.Tensor] = bucket.handle
        return tensors


def manifest_of(side: Side, version: int, tensors: Mapping[str, torch.Tensor]) -> Manifest:
    return Manifest(side, version, tuple(meta_of(name, tensor) for name, tensor in tensors.items()))


def check_complete(side: Side, tensors: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise PushError, naming tensors, unless exactly the expected ones are there in their shapes, all finite."""
    PushReceiver(manifest_of(side, 0, tensors), dict(expected))
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise PushError(f"{name} holds NaN or infinity")


def push_tensors(engine: EmbeddedEngine, side: Side, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Make the engine use these; raises PushError, the engine still on its old version."""
    manifest = manifest_of(side, version, tensors)
    checksums = tuple(map(tensor_checksum, tensors.values()))
    handle = HeldTensors().publish(tuple(tensors.values()))
    messages = (
        BeginPush(manifest),
        PushBucket(version, 0, manifest.tensors, checksums, handle),
        CommitPush(version, combined_checksum(zip(tensors, checksums, strict=True))),
    )
    run_push(messages, lambda message: [engine.update_weights(message)])
