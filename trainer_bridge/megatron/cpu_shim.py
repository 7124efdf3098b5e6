"""Run Megatron-Core where there is no CUDA, or no Transformer Engine: it takes both for given where no setting reaches.

Inside ``with cpu_shim():`` the places that name the device "cuda" see the CPU, and those that name Transformer Engine
see that it is absent. Where CUDA exists the first are left alone, so that CPU and GPU share one code path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from torch import _dynamo
from torch.overrides import TorchFunctionMode

CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}


@contextmanager
def cpu_shim() -> Iterator[None]:
    """Put the stand-ins in place inside the block; blocks nest, and everything is restored at the end."""
    without_cuda = not torch.cuda.is_available()
    stand_ins = (() if HAVE_TE else WITHOUT_TRANSFORMER_ENGINE) + (WITHOUT_CUDA if without_cuda else ())
    saved = [(module, name, getattr(module, name, _ABSENT)) for module, name, _ in stand_ins]
    try:
        for module, name, stand_in in stand_ins:
            setattr(module, name, stand_in)
        with _CudaMeansCpu() if without_cuda else nullcontext():
            yield
    finally:
        for module, name, original in saved:
            if original is _ABSENT:
                delattr(module, name)
            else:
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
    """Stands in for a CUDA stream and its events: the CPU runs in order, and there is nothing to wait for."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def wait_stream(self, other: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self, event: object = None) -> _InOrderStream:
        return self

    def synchronize(self) -> None: ...


def _nothing(*args: object, **kwargs: object) -> None: ...


def _moved_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Do what Megatron's function of this name does, for tensors that are on the CPU already, too.

    Gloo's all-to-all takes the numbers of rows that it sends as a list or an array, and refuses a tensor.
    """
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


_ABSENT = object()
_STREAM = _InOrderStream()
StandIns = tuple[tuple[Any, str, Any], ...]
WITHOUT_TRANSFORMER_ENGINE: StandIns = (
    # The router compares this name with None, and nothing has bound it.
    (moe_utils, "te_general_gemm", None),
    # Latent attention takes a class for Transformer Engine's that is none, and asks whether a module is of it.
    (multi_latent_attention, "HAVE_TE", False),
)
WITHOUT_CUDA: StandIns = (
    (torch.cuda, "current_device", lambda: torch.device("cpu")),
    (torch.cuda, "synchronize", _nothing),
    (torch.cuda, "empty_cache", _nothing),
    (torch.cuda, "current_stream", lambda device=None: _STREAM),
    (torch.cuda, "default_stream", lambda device=None: _STREAM),
    (torch.cuda, "stream", lambda stream=None: nullcontext()),
    (torch.cuda, "Stream", _InOrderStream),
    # Recomputation of activations keeps the CPU generator's state itself, and a CUDA state that is not there.
    (megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: None),
    (megatron_random, "_set_cuda_rng_state", _nothing),
    (token_dispatcher, "maybe_move_tensor_to_cpu", _moved_to_cpu),
    # Megatron compiles a router's few lines, which on a CPU takes up to half a minute in a process's first step.
    (_dynamo.config, "disable", True),
)
