"""Tensors in shared memory go to another process as torch's own handles: a few hundred bytes each.

The handles are what torch's multiprocessing pickles, and what SGLang's MultiprocessingSerializer reads; nothing of
SGLang is imported. Both ends must be the same torch, because it reads its own handles only, and on the same machine.
"""

from __future__ import annotations

import base64
import io
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing as torch_multiprocessing
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from slime_spec.errors import ConfigError
from slime_spec.weights.messages import NamedTensors

SHARING = "file_system"
DEVICE_ARGUMENT = 6  # of rebuild_cuda_tensor: storage_device


def check_torch(
    theirs: str | None,
    setting: str = "sglang_server.transport",
    value: str = "tensor",
    other: str = "--sglang-weight-transport distributed",
) -> None:
    """Raise ConfigError where the server's torch is another version; ``theirs`` is None where it is unknown."""
    ours = torch.__version__
    if theirs is not None and theirs.partition("+")[0] != ours.partition("+")[0]:
        raise ConfigError(
            setting,
            f"{value} needs the same torch on both sides: ours is {ours}, the server's is {theirs}",
            value,
            f"Pass {other}.",
        )


def share_by_file() -> None:
    """Have this process share CPU memory by name.

    File descriptors would be passed through a socket that only this process's own children may open: a server that
    tries dies of it.
    """
    torch_multiprocessing.set_sharing_strategy(SHARING)


def gpu_of(number: int) -> str:
    """Return the name of a GPU that every process knows it by; its number may be another in each."""
    return str(torch.cuda.get_device_properties(number).uuid)


def handles_of(named: NamedTensors) -> str:
    """Return the handles of shared tensors as text; a GPU is named as SGLang names GPUs in handles of its own."""
    written = io.BytesIO()
    _Pickler(written).dump(list(named))
    return base64.b64encode(written.getvalue()).decode()


class _Pickler(ForkingPickler):
    def reducer_override(self, value: object) -> Any:
        return _reduced(value) if type(value) is torch.Tensor else NotImplemented


def _reduced(tensor: torch.Tensor) -> tuple[Any, ...]:
    rebuild, arguments = reduce_tensor(tensor)
    if rebuild is not rebuild_cuda_tensor:
        return rebuild, arguments
    by_name = list(arguments)
    by_name[DEVICE_ARGUMENT] = gpu_of(arguments[DEVICE_ARGUMENT])
    return rebuild, tuple(by_name)
