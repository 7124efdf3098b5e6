"""RayObjectStoreTransport uses Ray's shared-memory object store: one copy in, none out on the same machine.

The trainer's actor puts a bucket's tensors as out-of-band buffers (their memory is copied straight into shared
memory); engines map the same pages read-only. The handle is the object reference, so a bucket is freed when the last
engine drops it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch

from slime_spec.weights.checksums import as_bytes
from slime_spec.weights.messages import PushBucket


class RayObjectStoreTransport:
    """Implements WeightTransport with Ray's object store, as the module says."""

    def publish(self, tensors: Sequence[torch.Tensor]) -> Any:
        # The reference is wrapped in a tuple: Ray would resolve a bare reference when it is passed to an actor.
        return (ray.put([as_bytes(tensor.cpu()).numpy() for tensor in tensors]),)

    def receive(self, bucket: PushBucket) -> list[torch.Tensor]:
        arrays: list[np.ndarray] = ray.get(bucket.handle[0])
        return [
            _read_only(array).view(meta.torch_dtype).reshape(meta.shape)
            for array, meta in zip(arrays, bucket.tensors, strict=True)
        ]


def _read_only(array: np.ndarray) -> torch.Tensor:
    """Wrap shared memory without copying it; torch has no read-only tensors and warns of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(array.data, dtype=torch.uint8)
