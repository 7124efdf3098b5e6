"""Megatron's torch_dist checkpoints are written beside, then moved into place; any layout can read them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
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
    publish_checkpoint,
    resolve_checkpoint,
    step_name,
    tidy,
    unfinished_folder,
)
from trainer_bridge.megatron.collective_write import WriteFailedError, agree, free_space, last_line
from trainer_bridge.megatron.model import PolicyModel
from trainer_bridge.megatron.optimizer import load_optimizer

# What a damaged or foreign checkpoint raises: torch.load and its zip and pickle readers, json, Megatron, torch.
READ_ERRORS = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    KeyError,
    UnpicklingError,
    CheckpointException,
    CheckpointingException,
)


@dataclass(frozen=True)
class TrainerState:
    """Holds the part of a checkpoint that is not tensors."""

    run: RunState
    optimizer_step: int


def save_checkpoint(root: str, model: PolicyModel, optimizer: Any, state: TrainerState) -> None:
    """Write ``root/step-NNNNNN`` (all ranks together) and point ``root/latest`` at it.

    Raises CheckpointError naming the folder if any rank could not write; the previous checkpoint stays whole and
    ``latest``.
    """
    folder, name = Path(root), step_name(state.run.rollout_id)
    unfinished = unfinished_folder(folder, name)
    first = dist.get_rank() == 0
    try:
        agree(lambda: begin_checkpoint(folder, name) if first else None)
        agree(lambda: dist_checkpointing.save(_contents(model, optimizer, state, is_loading=False), str(unfinished)))
        agree(lambda: publish_checkpoint(folder, name) if first else None)
    except WriteFailedError as error:
        if first:
            tidy(folder)
        raise CheckpointError(
            f"checkpoint folder {folder}",
            f"must take a whole checkpoint: {error}",
            free_space(folder),
            "Free disk space or choose another --output-dir; the previous checkpoint is intact.",
        ) from None


def load_checkpoint(path: str, model: PolicyModel, optimizer: Any) -> TrainerState:
    """Fill model and optimizer from a checkpoint folder, or from the ``latest`` of a folder of checkpoints.

    Raises CheckpointError naming the folder when it is damaged or belongs to another model.
    """
    folder = resolve_checkpoint(path)
    try:
        common = dist_checkpointing.load_common_state_dict(str(folder))
        state = TrainerState(RunState.of_checkpoint(common["run"]), common["optimizer_step"])
        loaded = dist_checkpointing.load(_contents(model, optimizer, state, is_loading=True), str(folder))
    except READ_ERRORS as error:
        raise CheckpointError(
            f"checkpoint folder {folder}",
            f"must be a whole checkpoint of this model: {last_line(error)}",
            type(error).__name__,
            "Pass --load DIR with an older step-NNNNNN folder.",
        ) from error
    _fill(model, loaded["model"])
    if state.optimizer_step:
        load_optimizer(optimizer, loaded["optimizer"])
    torch.set_rng_state(common["torch_rng_state"])
    return state


def _fill(model: PolicyModel, tensors: dict[str, torch.Tensor]) -> None:
    """Fill the weights without Megatron's "extra state" of quantised layers, empty here; torch would not know it."""
    extra = "_extra_state"
    unmatched = model.load_state_dict(
        {name: tensor for name, tensor in tensors.items() if not name.endswith(extra)}, strict=False
    )
    missing = [name for name in unmatched.missing_keys if not name.endswith(extra)]
    assert not missing, f"the checkpoint left weights unfilled: {missing}"
    assert not unmatched.unexpected_keys, f"the checkpoint holds weights of no layer: {unmatched.unexpected_keys}"


def _contents(model: PolicyModel, optimizer: Any, state: TrainerState, is_loading: bool) -> dict[str, Any]:
    """Return a checkpoint's contents; a checkpoint of step 0 has no state of Adam, which begins with its first step."""
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
