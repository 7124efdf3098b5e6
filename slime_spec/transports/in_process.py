"""InProcessTransport passes weights to an engine in the same process: it receives the published tensors themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from slime_spec.weights.messages import NamedTensors, Opening, PushBucket


class InProcessTransport:
    """Implements WeightTransport by reference: nothing is copied."""

    lends = False

    def open(self, host: str, opening: Opening) -> None:
        pass

    def publish(self, named: NamedTensors) -> tuple[torch.Tensor, ...]:
        return tuple(tensor for _, tensor in named)

    def join(self, routes: Sequence[None], place: int) -> None:
        pass

    def receive(self, bucket: PushBucket) -> list[torch.Tensor]:
        return list(bucket.handle)

    def release(self) -> None:
        pass

    def close(self) -> None:
        pass
