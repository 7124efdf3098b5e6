"""Return freed memory to the system, as engines and trainer share a machine and take turns."""

import ctypes

import torch


def release_freed_memory() -> None:
    """Return what allocators keep for reuse: torch's cache on CUDA, glibc's heap (gigabytes after a step)."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have no such call and retain less
    if trim is not None:
        trim(0)
