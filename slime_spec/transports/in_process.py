"""InProcessTransport passes weights to an engine in the same process: it receives the published tensors themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from slime_spec.weights.messages import PushBucket


class InProcessTransport:
    """Implements WeightTransport by reference: nothing is copied."""

    def publish(self, tensors: Sequence[torch.Tensor]) -> Any:
        return list(tensors)

    def receive(self, bucket: PushBucket) -> list[torch.Tensor]:
        tensors: list[torch.Tensor] = bucket.handle
        return tensors
