"""RayObjectStoreTransport uses Ray's shared-memory object store: one copy in, none out on the same machine.

The trainer's actor puts a bucket's tensors as out-of-band buffers (their memory is copied straight into shared
memory); engines map the same pages read-only. The handle is the object reference, so a bucket is freed when the trainer
has closed the push and the last engine drops it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import ray
import torch

from slime_spec.transports.read_only import read_only
from slime_spec.weights.checksums import as_bytes
from slime_spec.weights.messages import NamedTensors, Opening, PushBucket


class RayObjectStoreTransport:
    """Implements WeightTransport with Ray's object store, as the module says."""

    lends = False

    def __init__(self) -> None:
        # Ray may not count a reference on its way from one process to another, so it is held here.
        self._published: list[ray.ObjectRef] = []

    def open(self, host: str, opening: Opening) -> None:
        pass

    def publish(self, named: NamedTensors) -> tuple[ray.ObjectRef]:
        # The reference is wrapped in a tuple: Ray would resolve a bare reference when it is passed to an actor.
        self._published.append(ray.put([as_bytes(tensor.cpu()).numpy() for _, tensor in named]))
        return (self._published[-1],)

    def join(self, routes: Sequence[None], place: int) -> None:
        pass

    def receive(self, bucket: PushBucket) -> list[torch.Tensor]:
        arrays: list[np.ndarray] = ray.get(bucket.handle[0])
        return [
            read_only(array.data).view(meta.torch_dtype).reshape(meta.shape)
            for array, meta in zip(arrays, bucket.tensors, strict=True)
        ]

    def release(self) -> None:
        pass

    def close(self) -> None:
        self._published.clear()
