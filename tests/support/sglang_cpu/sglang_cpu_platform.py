"""SGLang plugin (entry-point group ``sglang.srt.plugins``): speculation on a CPU that has no AMX.

Only SGLang's ``intel_amx`` attention backend verifies drafts on a CPU, and SGLang replaces it where AMX is absent. Its
two attention kernels come from the stand-in ``sgl_kernel`` beside this file, which needs no AMX.
"""

import multiprocessing
import os
from typing import Any

import torch
from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS
from sglang.srt.runtime_context import _PLATFORM


def activate() -> None:
    _PLATFORM._install(has_amx=True)
    # SGLang 0.5.21 waits for CUDA before it sums up weights, on a CPU too.
    torch.cuda.synchronize = lambda device=None: None
    # And registers the host memory of routed experts with CUDA.
    ALLOC_MEMORY_FUNCS["cpu"] = _plain_memory
    # A server's processes are forked from its first one, which has a single thread then and has imported SGLang: for
    # each that is spawned this takes some 8 s of a core.
    multiprocessing.set_start_method = lambda method, force=False: None
    if os.environ.get("SGLANG_STAND_IN_FP8"):
        import fp8_in_torch  # of this folder; it takes imports that other servers do not need here

        fp8_in_torch.activate()
    if os.environ.get("SGLANG_STAND_IN_MEMORY_SAVER"):
        import memory_saver_on_cpu

        memory_saver_on_cpu.activate()


def _plain_memory(
    dims: tuple[int, ...], dtype: torch.dtype, device: str, pin_memory: bool, allocator: Any, granularity: Any = None
) -> torch.Tensor:
    return torch.zeros(dims, dtype=dtype)
