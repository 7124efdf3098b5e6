"""TensorTransport puts tensors in shared memory (on a GPU: CUDA IPC) and sends their handles in the request.

See slime_spec.transports.torch_handles for what the two ends must have in common.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rollout.sglang_engine.client import SglangClient
from slime_spec.transports.torch_handles import handles_of, share_by_file
from slime_spec.weights.messages import NamedTensors

PATH = "/update_weights_from_tensor"


class TensorTransport:
    """Sends buckets to a server of ``num_ranks`` tensor-parallel ranks; ``on_gpu`` shares them as CUDA memory."""

    def __init__(self, num_ranks: int, on_gpu: bool) -> None:
        self._num_ranks, self._on_gpu = num_ranks, on_gpu
        share_by_file()

    async def open(self, client: SglangClient) -> None:
        pass

    async def send(self, client: SglangClient, bucket: NamedTensors, fields: Mapping[str, Any]) -> None:
        shared = [(name, self._shareable(tensor)) for name, tensor in bucket]
        payload = handles_of(shared)
        await client.post(PATH, {"serialized_named_tensors": [payload] * self._num_ranks, **fields})

    async def close(self, client: SglangClient) -> None:
        pass

    def _shareable(self, tensor: torch.Tensor) -> torch.Tensor:
        # The tensor is copied: a view would share its whole base tensor, and Ray's memory is read-only.
        return tensor.to("cuda") if self._on_gpu else tensor.clone().share_memory_()
