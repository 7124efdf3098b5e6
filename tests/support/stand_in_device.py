"""A device "cuda" that computes on the CPU, for machines without a GPU: what a GPU refuses it refuses, and it counts.

    with stand_in_device() as device:
        weights = torch.ones(3, device="cuda")   # a DeviceTensor, whose ``host`` holds the numbers
        weights + torch.ones(3)                  # RuntimeError: two devices
        weights.sum().item()
    assert device.reads == ["_local_scalar_dense"]

It shows wrong devices and counts waits; it has no kernels, so it shows nothing of a GPU's speed, rounding, or order.
Everything that makes the host wait for a GPU is a read; what goes to the device from memory of the host is an upload.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.cpp_extension import include_paths, library_paths

from rollout.embedded import assemble
from rollout.embedded.cuda import fp8
from tests.support.fp8_on_cpu import product

DEVICE = torch.device("cuda", 0)
# Their results, or the shapes of their results, are numbers on the host.
READS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "argwhere"),
    *("masked_select", "unique_consecutive", "_unique2", "unique_dim", "bincount"),
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# A CPU build of torch has nothing that enters a CUDA device, not even to do nothing there.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::DeviceGuardImplRegistrar registered(
    c10::DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
"""


@dataclass
class StandIn:
    """What crossed between host and device so far, by operator, in order; synchronisations are reads."""

    reads: list[str] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)

    def forget(self) -> None:
        self.reads.clear()
        self.uploads.clear()


_active = StandIn()


class DeviceTensor(torch.Tensor):
    """A tensor on the stand-in; ``host`` is the CPU tensor that it computes with."""

    host: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> DeviceTensor:
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset()}
        with torch.inference_mode(host.is_inference()):  # a view is no inference tensor where its base is none
            made = torch.Tensor._make_wrapper_subclass(cls, host.shape, dtype=host.dtype, device=DEVICE, **layout)  # type: ignore[attr-defined]
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = func._schema.name.removeprefix("aten::")
        if operator == "copy_":
            return _copy(*args, **kwargs)
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
        target = _target_of(func, args, kwargs)
        if target is None:
            _check(operator, args, tensors)
        _count(operator, args, kwargs, target)
        wrapper_of = {id(each.host): each for each in tensors if isinstance(each, DeviceTensor)}
        host_args, host_kwargs = tree_map_only(DeviceTensor, lambda each: each.host, (args, kwargs))
        host_args, host_kwargs = tree_map_only(torch.device, lambda each: torch.device("cpu"), (host_args, host_kwargs))
        result = func(*host_args, **host_kwargs)
        if target is not None and target.type == "cpu":
            return result.clone() if id(result) in wrapper_of else result
        made = lambda each: wrapper_of[id(each)] if id(each) in wrapper_of else DeviceTensor(each)  # noqa: E731
        return tree_map_only(torch.Tensor, made, result)

    def tolist(self) -> Any:
        _active.reads.append("tolist")
        return self.host.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        return self.cpu().numpy()

    def data_ptr(self) -> int:
        raise RuntimeError("a tensor of the stand-in device has no address")

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"DeviceTensor({self.host!r})"

    def __format__(self, spec: str) -> str:
        return format(self.host, spec)

    def __bool__(self) -> bool:
        _active.reads.append("is_nonzero")
        return bool(self.host)


def _target_of(func: Any, args: Any, kwargs: Any) -> torch.device | None:
    """The device that a call names for its result, if it names one."""
    given = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
    if func._schema.name == "aten::to" and isinstance(given.get("other"), torch.Tensor):
        return given["other"].device
    return None if given.get("device") is None else torch.device(given["device"])


def _check(operator: str, args: Any, tensors: list[torch.Tensor]) -> None:
    """Raise where CUDA would: operands of both devices, but for numbers and for indices that are on the host."""
    if operator in INDEXING and isinstance(args[0], DeviceTensor):
        tensors = [args[0], *args[2:3]]
    if any(not isinstance(each, DeviceTensor) and each.dim() > 0 for each in tensors if isinstance(each, torch.Tensor)):
        found = "found at least two devices, cuda:0 and cpu!"
        raise RuntimeError(f"Expected all tensors to be on the same device, but {found} ({operator})")


def _count(operator: str, args: Any, kwargs: Any, target: torch.device | None) -> None:
    first = args[0] if args else None
    downloads = target is not None and target.type == "cpu" and isinstance(first, DeviceTensor)
    if downloads or operator in READS or _has_a_shape_of_its_data(operator, args, kwargs):
        _active.reads.append(operator)
    moved = args[1] if operator in INDEXING else [first] if target is not None and target.type == "cuda" else []
    for each in moved:
        if isinstance(each, torch.Tensor) and not isinstance(each, DeviceTensor):
            _active.uploads.append(operator)


def _has_a_shape_of_its_data(operator: str, args: Any, kwargs: Any) -> bool:
    """Whether a GPU must have computed an argument before the host knows how large the result is."""
    if operator == "where":
        return len(args) == 1
    if operator == "repeat_interleave":
        return isinstance(args[-1], torch.Tensor) and kwargs.get("output_size") is None
    if operator not in INDEXING or all(each is None or each.dtype != torch.bool for each in args[1]):
        return False
    fills = operator.startswith("index_put") and args[2].numel() == 1 and len(args[1]) == 1  # computed as masked_fill
    return not fills


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Copy between, or on, the devices."""
    if not isinstance(target, DeviceTensor):
        _active.reads.append("copy_")
    elif not isinstance(source, DeviceTensor):
        _active.uploads.append("copy_")
    _host(target).copy_(_host(source))
    return target


def _host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.host if isinstance(tensor, DeviceTensor) else tensor


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> torch.Tensor:
    return DeviceTensor(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
    return DeviceTensor(torch.empty_strided(size, stride, dtype=dtype))


class Event:
    """A point of the device's queue, which is always empty."""

    def __init__(self, **_: Any) -> None:
        self._at = 0.0

    def record(self, stream: object = None) -> None:
        self._at = perf_counter()

    def synchronize(self) -> None:
        _active.reads.append("Event.synchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end._at - self._at)


def _synchronize(device: object = None) -> None:
    _active.reads.append("cuda.synchronize")


# What asks about a GPU gets an H100's answers.
CUDA = {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_name": lambda device=None: "stand-in",
    "mem_get_info": lambda device=None: (80 << 30, 80 << 30),
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
    "empty_cache": lambda: None,
    "synchronize": _synchronize,
    "Event": Event,
}


@contextmanager
def stand_in_device() -> Iterator[StandIn]:
    """Make "cuda" the stand-in, in every thread, where torch was built without CUDA; what is counted starts anew."""
    _active.forget()
    if torch.cuda.is_available is CUDA["is_available"]:  # within another ``with``
        yield _active
        return
    assert not torch.backends.cuda.is_built(), "this build of torch has a CUDA device of its own"
    _enter_no_device()
    kernels = torch.library.Library("aten", "IMPL")
    # Reached below __torch_dispatch__: by factories, and by torch.tensor, which copies with Python's key left out.
    kernels.impl("empty.memory_format", _empty, "CUDA")
    kernels.impl("empty_strided", _empty_strided, "CUDA")
    kernels.impl("copy_", _copy, "CUDA")
    with ExitStack() as patched:
        patched.callback(kernels._destroy)
        for name, value in CUDA.items():
            patched.enter_context(patch.object(torch.cuda, name, value))
        patched.enter_context(patch.object(torch.Tensor, "pin_memory", lambda self: self))
        # It has no addresses for kernels to read: passes run operator by operator.
        patched.enter_context(patch.object(assemble, "make_graphs", lambda config, spec, device: None))
        patched.enter_context(patch.object(fp8, "product", product))
        yield _active


@contextmanager
def uncounted() -> Iterator[None]:
    """Count nothing meanwhile: what stands in for a kernel may read what a kernel need not."""
    reads, uploads = list(_active.reads), list(_active.uploads)
    yield
    _active.reads[:], _active.uploads[:] = reads, uploads


_has_guard = False


def _enter_no_device() -> None:
    """Teach torch to enter a CUDA device, once in a process; a second or two of a C++ compiler."""
    global _has_guard
    if _has_guard:
        return
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        words = [*(f"-I{path}" for path in include_paths()), *(f"-L{path}" for path in library_paths()), "-lc10"]
        subprocess.run(["c++", "-std=c++20", "-shared", "-fPIC", str(source), "-o", str(built), *words], check=True)
        torch.ops.load_library(str(built))
    _has_guard = True
