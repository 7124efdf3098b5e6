"""Run Megatron-Core where there is no CUDA: it names the device "cuda" in places no setting reaches.

Inside ``with cpu_shim():`` those places see the CPU. Where CUDA exists the block changes nothing, so that CPU and GPU
share one code path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode

CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}


@contextmanager
def cpu_shim() -> Iterator[None]:
    """Make "cuda" mean the CPU inside the block; blocks nest, and everything is restored at the end."""
    if torch.cuda.is_available():
        yield
        return
    saved = [(module, name, getattr(module, name)) for module, name, _ in STAND_INS]
    try:
        for module, name, stand_in in STAND_INS:
            setattr(module, name, stand_in)
        with _CudaMeansCpu():
            yield
    finally:
        for module, name, original in saved:
            setattr(module, name, original)


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites ``device="cuda"``, ``tensor.cuda()`` and ``tensor.type()`` (the optimizer asserts a CUDA type name)."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if _names_cuda(options.get("device")):
            options["device"] = "cpu"
            options.pop("pin_memory", None)
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not options and args[0].dtype in CUDA_TYPE_NAMES:
            return CUDA_TYPE_NAMES[args[0].dtype]
        return func(*args, **options)


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.partition(":")[0] == "cuda"


class _InOrderStream:
    """Stands in for a CUDA stream: the CPU runs in order, and there is nothing to wait for."""

    def wait_stream(self, other: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None: ...


def _nothing(*args: object, **kwargs: object) -> None: ...


_STREAM = _InOrderStream()
STAND_INS: tuple[tuple[Any, str, Any], ...] = (
    (torch.cuda, "current_device", lambda: torch.device("cpu")),
    (torch.cuda, "synchronize", _nothing),
    (torch.cuda, "empty_cache", _nothing),
    (torch.cuda, "current_stream", lambda device=None: _STREAM),
    (torch.cuda, "default_stream", lambda device=None: _STREAM),
    (torch.cuda, "stream", lambda stream=None: nullcontext()),
    # Recomputation of activations keeps the CPU generator's state itself, and a CUDA state that is not there.
    (megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: None),
    (megatron_random, "_set_cuda_rng_state", _nothing),
)
