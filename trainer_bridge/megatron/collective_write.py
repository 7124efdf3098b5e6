"""Several ranks write files together: all succeed, or all fail with the same reason."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

# A full disk shows as OSError, or as what torch, safetensors and Megatron make of it in their writers.
WRITE_ERRORS = (
    OSError,
    RuntimeError,
    SafetensorError,
    CheckpointException,
    CheckpointingException,
)


class WriteFailedError(Exception):
    """Some rank could not write; every rank raises this with the same text."""


def agree(action: Callable[[], object]) -> None:
    """Run the action; if it failed on any rank, fail on all, so that none waits for the others."""
    problem = ""
    try:
        action()
    except WRITE_ERRORS as error:
        problem = last_line(error)
    if found := first_problem(problem):
        raise WriteFailedError(found)


def first_problem(problem: str) -> str:
    """Return the first rank's problem that is not "", the same on every rank; collective."""
    problems: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next(filter(None, problems), "")


def last_line(error: BaseException) -> str:
    """Return the end of an error's text, where wrapped errors name their cause."""
    return (str(error).strip().splitlines() or [""])[-1] or type(error).__name__


def free_space(folder: Path) -> str:
    """Return what the file system that ``folder`` is, or would be, on has left, for an error message."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return f"{shutil.disk_usage(existing).free / 1e9:.2f} GB free"
