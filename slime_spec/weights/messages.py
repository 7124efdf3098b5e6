"""The pusher's half: named tensors as the buckets, and as all the messages, of a push."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from slime_spec.interfaces import WeightTransport
from slime_spec.weights.manifest import Manifest, Side, combined_checksum, meta_of, tensor_checksum
from slime_spec.weights.push import BeginPush, CommitPush, PushBucket, PushMessage, bucketed


def bucket_of(
    named: Sequence[tuple[str, torch.Tensor]], version: int, index: int, transport: WeightTransport
) -> PushBucket:
    """Published tensors with their names, shapes, dtypes and checksums."""
    tensors = [tensor for _, tensor in named]
    return PushBucket(
        version=version,
        index=index,
        tensors=tuple(meta_of(name, tensor) for name, tensor in named),
        checksums=tuple(tensor_checksum(tensor) for tensor in tensors),
        handle=transport.publish(tensors),
    )


def manifest_of(side: Side, version: int, weights: Mapping[str, torch.Tensor]) -> Manifest:
    return Manifest(side, version, tuple(meta_of(name, tensor) for name, tensor in weights.items()))


def push_messages(
    weights: Mapping[str, torch.Tensor], version: int, side: Side, bucket_bytes: int, transport: WeightTransport
) -> Iterator[PushMessage]:
    """A push of weights that are at hand, for ``run_push``."""
    yield BeginPush(manifest_of(side, version, weights))
    checksums: list[tuple[str, int]] = []
    for index, named in enumerate(bucketed(weights.items(), bucket_bytes)):
        bucket = bucket_of(named, version, index, transport)
        checksums += zip((name for name, _ in named), bucket.checksums, strict=True)
        yield bucket
    yield CommitPush(version, combined_checksum(checksums))
