"""Weights that a client sent or named, as pushes to the engine: all or nothing."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch

from rollout.embedded.engine import EmbeddedEngine
from slime_spec.errors import PushError
from slime_spec.transports.in_process import InProcessTransport
from slime_spec.weights.messages import Side
from slime_spec.weights.receive import PushReceiver
from slime_spec.weights.run import manifest_of, push_messages, run_push

ONE_BUCKET = sys.maxsize  # bytes: nothing travels, so nothing is gained by sending parts


def check_complete(side: Side, tensors: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise PushError, naming tensors, unless exactly the expected ones are there in their shapes, all finite."""
    PushReceiver(manifest_of(side, 0, tensors), dict(expected))
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise PushError(f"{name} holds NaN or infinity")


def push_tensors(engine: EmbeddedEngine, side: Side, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Make the engine use these; raises PushError, the engine still on its old version."""
    messages = push_messages(tensors, version, side, ONE_BUCKET, InProcessTransport())
    run_push(messages, lambda message: [engine.update_weights(message)])
