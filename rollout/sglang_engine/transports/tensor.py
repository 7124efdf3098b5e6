"""TensorTransport puts tensors in shared memory (on a GPU: CUDA IPC) and sends their handles in the request.

The handles are what torch's own multiprocessing pickles, and what SGLang's MultiprocessingSerializer reads; nothing of
SGLang is imported. Both ends must be the same torch, because it reads its own handles only, and on the same machine.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing as torch_multiprocessing

from rollout.sglang_engine.client import SglangClient
from rollout.sglang_engine.transports.bucket import NamedTensors
from slime_spec.errors import ConfigError

PATH = "/update_weights_from_tensor"
SHARING = "file_system"


def check_torch(theirs: str | None) -> None:
    """Raise ConfigError where the server's torch is another version; ``theirs`` is None where it is unknown."""
    ours = torch.__version__
    if theirs is not None and theirs.partition("+")[0] != ours.partition("+")[0]:
        raise ConfigError(
            "sglang_server.transport",
            f"tensor needs the same torch on both sides: ours is {ours}, the server's is {theirs}",
            "tensor",
            "Pass --sglang-weight-transport distributed.",
        )


class TensorTransport:
    """Sends buckets to a server of ``num_ranks`` tensor-parallel ranks; ``on_gpu`` shares them as CUDA memory."""

    def __init__(self, num_ranks: int, on_gpu: bool) -> None:
        self._num_ranks, self._on_gpu = num_ranks, on_gpu
        # File descriptors would be passed through a socket that only this process's own children may open: a server
        # that tries dies of it.
        torch_multiprocessing.set_sharing_strategy(SHARING)

    async def open(self, client: SglangClient) -> None:
        pass

    async def send(self, client: SglangClient, bucket: NamedTensors, fields: Mapping[str, Any]) -> None:
        shared = [(name, self._shareable(tensor)) for name, tensor in bucket]
        payload = base64.b64encode(_handles(shared)).decode()
        await client.post(PATH, {"serialized_named_tensors": [payload] * self._num_ranks, **fields})

    async def close(self, client: SglangClient) -> None:
        pass

    def _shareable(self, tensor: torch.Tensor) -> torch.Tensor:
        # The tensor is copied: a view would share its whole base tensor, and Ray's memory is read-only.
        return tensor.to("cuda") if self._on_gpu else tensor.clone().share_memory_()


def _handles(tensors: Sequence[tuple[str, torch.Tensor]]) -> bytes:
    written = io.BytesIO()
    ForkingPickler(written).dump(tensors)
    return written.getvalue()
