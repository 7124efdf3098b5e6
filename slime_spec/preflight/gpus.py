"""This module reads the memory of the GPUs that a run on this machine may use."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

QUESTION = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
ASK_TIMEOUT_S = 20.0
AMD_DRIVER = Path("/dev/kfd")
MIB = 2**20


def visible_gpu_bytes(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """Return the memory of each NVIDIA GPU that CUDA_VISIBLE_DEVICES leaves.

    None where another vendor's driver has them.
    """
    try:
        done = subprocess.run(QUESTION, capture_output=True, text=True, timeout=ASK_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None if AMD_DRIVER.exists() else ()
    installed = [int(line) * MIB for line in done.stdout.splitlines() if line.strip().isdigit()]
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return tuple(installed)
    numbers = [word.strip() for word in chosen.split(",") if word.strip() not in ("", "-1")]
    # A GPU may be named by its number or by its UUID; all of one machine are taken to be of one size.
    return tuple(installed[: len(numbers)])
