"""This module asks the driver what GPUs a run on this machine may use: their memory and compute capability."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

MEMORY, CAPABILITY = "memory.total", "compute_cap"
ASK_TIMEOUT_S = 20.0
AMD_DRIVER = Path("/dev/kfd")
MIB = 2**20
Fact = TypeVar("Fact")


def visible_gpu_bytes(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """Return the memory of each NVIDIA GPU that CUDA_VISIBLE_DEVICES leaves.

    None where another vendor's driver has them.
    """
    answer = _ask(MEMORY)
    if answer is None:
        return None if AMD_DRIVER.exists() else ()
    return _left(tuple(int(line) * MIB for line in answer if line.isdigit()), environ)


def visible_gpu_capabilities(environ: Mapping[str, str]) -> tuple[tuple[int, int], ...]:
    """Return the compute capability of each NVIDIA GPU that CUDA_VISIBLE_DEVICES leaves, as ``((9, 0),)``.

    Empty where the driver does not say.
    """
    parts = [line.split(".") for line in _ask(CAPABILITY) or ()]
    told = tuple((int(each[0]), int(each[1])) for each in parts if len(each) == 2 and all(map(str.isdigit, each)))
    return _left(told, environ)


def _ask(what: str) -> list[str] | None:
    """Return the driver's answer, a line for each GPU; None without a driver that answers."""
    question = ("nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits")
    try:
        done = subprocess.run(question, capture_output=True, text=True, timeout=ASK_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return [line.strip() for line in done.stdout.splitlines()]


def _left(installed: tuple[Fact, ...], environ: Mapping[str, str]) -> tuple[Fact, ...]:
    """Return the facts of the GPUs that the environment leaves."""
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return installed
    numbers = [word.strip() for word in chosen.split(",") if word.strip() not in ("", "-1")]
    # A GPU may be named by its number or by its UUID; all of one machine are taken to be alike.
    return installed[: len(numbers)]
