"""Megatron's torch_dist checkpoints: written beside, then moved into place; readable under any layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint import CheckpointException

from slime_spec.errors import CheckpointError
from slime_spec.interfaces import RunState
from trainer_bridge.checkpoint_folder import (
    begin_checkpoint,
    drop_checkpoint,
    publish_checkpoint,
    resolve_checkpoint,
    step_name,
)
from trainer_bridge.megatron.model import PolicyModel

# A full disk shows as OSError, or as what torch and Megatron make of it in their writer processes.
WRITE_ERRORS = (OSError, RuntimeError, CheckpointException, CheckpointingException)


@dataclass(frozen=True)
class TrainerState:
    """What a checkpoint holds besides tensors."""

    run: RunState
    optimizer_step: int


def save_checkpoint(root: str, model: PolicyModel, optimizer: Any, state: TrainerState) -> None:
    """Write ``root/step-NNNNNN`` (all ranks together) and point ``root/latest`` at it.

    Raises CheckpointError naming the folder if any rank could not write; the previous checkpoint stays whole and
    ``latest``.
    """
    folder, name = Path(root), step_name(state.run.rollout_id)
    unfinished = folder / f".{name}.unfinished"
    first = dist.get_rank() == 0
    try:
        _agree(lambda: begin_checkpoint(folder, name) if first else None)
        _agree(lambda: dist_checkpointing.save(_contents(model, optimizer, state, is_loading=False), str(unfinished)))
        _agree(lambda: publish_checkpoint(folder, name) if first else None)
    except _WriteFailedError as error:
        if first:
            drop_checkpoint(folder, name)
        raise CheckpointError(
            f"checkpoint folder {folder}",
            f"must take a whole checkpoint: {error}",
            f"{_free_gb(folder):.2f} GB free",
            "Free disk space or choose another --output-dir; the previous checkpoint is intact.",
        ) from None


def load_checkpoint(path: str, model: PolicyModel, optimizer: Any) -> TrainerState:
    """Fill model and optimizer from a checkpoint folder, or from the ``latest`` of a folder of checkpoints."""
    folder = str(resolve_checkpoint(path))
    common = dist_checkpointing.load_common_state_dict(folder)
    state = TrainerState(RunState(**common["run"]), common["optimizer_step"])
    loaded = dist_checkpointing.load(_contents(model, optimizer, state, is_loading=True), folder)
    # Megatron adds empty "extra state" entries for quantised layers; torch would not know them.
    weights = {name: tensor for name, tensor in loaded["model"].items() if not name.endswith("_extra_state")}
    model.load_state_dict(weights, strict=False)
    if state.optimizer_step:
        optimizer.load_state_dict(loaded["optimizer"])
    torch.set_rng_state(common["torch_rng_state"])
    return state


def _contents(model: PolicyModel, optimizer: Any, state: TrainerState, is_loading: bool) -> dict[str, Any]:
    """Adam has no state before its first step, so a checkpoint of step 0 holds none."""
    sharded_model = model.sharded_state_dict()
    contents = {
        "model": sharded_model,
        "run": asdict(state.run),
        "optimizer_step": state.optimizer_step,
        "torch_rng_state": torch.get_rng_state(),
    }
    if state.optimizer_step:
        contents["optimizer"] = optimizer.sharded_state_dict(sharded_model, is_loading=is_loading)
    return contents


class _WriteFailedError(Exception):
    """Some rank could not write; every rank raises this with the same text."""


def _agree(action: Callable[[], object]) -> None:
    """Run the action; if it failed on any rank, fail on all, so that none waits for the others."""
    problem = ""
    try:
        action()
    except WRITE_ERRORS as error:
        problem = (str(error).strip().splitlines() or [""])[-1] or type(error).__name__
    problems: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if any(problems):
        raise _WriteFailedError(next(text for text in problems if text))


def _free_gb(folder: Path) -> float:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free / 1e9
