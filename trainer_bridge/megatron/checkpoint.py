"""Megatron's torch_dist checkpoints are written beside, then moved into place; any layout can read them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint import CheckpointException

from slime_spec.errors import CheckpointError
from slime_spec.interfaces import RunState
from trainer_bridge.checkpoint_folder import (
    begin_checkpoint,
    checkpoints_in,
    publish_checkpoint,
    step_name,
    tidy,
    unfinished_folder,
)
from trainer_bridge.checksums import CHECKSUMS, Sums, damage, has_checksums, sums_of, write_checksums
from trainer_bridge.megatron import adam_state
from trainer_bridge.megatron.adam_state import OnHost
from trainer_bridge.megatron.collective_write import WriteFailedError, agree, first_problem, free_space, last_line
from trainer_bridge.megatron.draft_side import STATE_FILE, DraftSide
from trainer_bridge.megatron.model import PolicyModel
from trainer_bridge.megatron.no_code import metadata_problem, plain_objects_only

logger = logging.getLogger(__name__)

OLDER = "Pass --load DIR with an older step-NNNNNN folder."
FROM_START = "Start again without --load."
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


def save_checkpoint(
    root: str,
    model: PolicyModel,
    optimizer: Any,
    state: TrainerState,
    on_host: OnHost,
    draft: DraftSide | None = None,
) -> None:
    """Write ``root/step-NNNNNN`` (all ranks together) and point ``root/latest`` at it.

    ``on_host`` gives each tensor where its values are: on the device, or in host memory where it has left the device.
    Raises CheckpointError naming the folder if any rank could not write; the previous checkpoint stays whole and
    ``latest``.
    """
    folder, name = Path(root), step_name(state.run.rollout_id)
    unfinished = unfinished_folder(folder, name)
    first = dist.get_rank() == 0
    sums: dict[str, Any] = {}
    try:
        agree(lambda: begin_checkpoint(folder, name) if first else None)
        agree(lambda: dist_checkpointing.save(_to_save(model, optimizer, state, on_host), str(unfinished)))
        if draft is not None:
            of_draft = draft.state(on_host)
            agree(lambda: torch.save(of_draft, unfinished / STATE_FILE) if of_draft else None)
        agree(lambda: sums.update(sums_of(unfinished.glob(f"__{dist.get_rank()}_*"))))
        all_sums: list[Sums] = [{}] * dist.get_world_size()
        dist.all_gather_object(all_sums, sums)
        agree(lambda: _seal(unfinished, all_sums) if first else None)
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


def _seal(unfinished: Path, of_ranks: Sequence[Sums]) -> None:
    """Write the checksums of every file: each rank's tensors, and what the first rank wrote beside them."""
    sums = {name: each for of_rank in of_ranks for name, each in of_rank.items()}
    write_checksums(unfinished, {**sums, **sums_of(path for path in unfinished.iterdir() if path.name not in sums)})


def load_checkpoint(path: str, model: PolicyModel, optimizer: Any, draft: DraftSide | None = None) -> TrainerState:
    """Fill model, optimizer and draft from a checkpoint folder, or the newest whole one of a folder of checkpoints.

    All ranks together; nothing in the folder is executed. Raises CheckpointError naming the folder when it is damaged
    or belongs to another model.
    """
    folder = _newest_whole(path)
    try:
        with plain_objects_only():
            common = dist_checkpointing.load_common_state_dict(str(folder))
            state = TrainerState(RunState.of_checkpoint(common["run"]), common["optimizer_step"])
            sharded_model = model.sharded_state_dict()
            wanted = {"model": sharded_model}
            if state.optimizer_step:
                wanted["adam"] = adam_state.to_load(sharded_model)
            loaded = dist_checkpointing.load(wanted, str(folder))
    except READ_ERRORS as error:
        raise _not_whole(folder, last_line(error), type(error).__name__, OLDER) from error
    _fill(model, loaded["model"])
    if state.optimizer_step:
        adam_state.take(model.sharded_state_dict(), optimizer, loaded["adam"], state.optimizer_step)
    _load_draft(folder, draft)
    torch.set_rng_state(common["torch_rng_state"])
    return state


def _load_draft(folder: Path, draft: DraftSide | None) -> None:
    if draft is None and (folder / STATE_FILE).is_file():
        logger.warning(
            "left out the checkpoint's trained draft: --enable-draft-training goes on with it path=%s", folder
        )
    try:
        if draft is not None and not draft.load(folder):
            logger.warning("found no trained draft, training begins with the draft's folder path=%s", folder)
    except READ_ERRORS as error:
        raise _not_whole(
            folder, f"{STATE_FILE}: {last_line(error)}", type(error).__name__, "Pass the run's draft."
        ) from error


def _newest_whole(path: str) -> Path:
    """Return the newest checkpoint of ``path`` whose files are as they were written, the same on every rank."""
    newest, *older = checkpoints_in(path)
    for folder in (newest, *older):
        problem = first_problem(damage(folder, dist.get_rank(), dist.get_world_size()) or metadata_problem(folder))
        if not problem:
            if folder != newest:
                logger.warning("resumed from an older checkpoint path=%s", folder)
            if not has_checksums(folder):
                logger.warning("read a checkpoint without %s, flipped bytes would not be seen: %s", CHECKSUMS, folder)
            return folder
        if not older:
            raise _not_whole(folder, problem, folder.name, OLDER)
        logger.warning("found a damaged checkpoint path=%s problem=%s", folder, problem)
    raise _not_whole(newest, "it is damaged, and so are the older ones", newest.name, FROM_START)


def _not_whole(folder: Path, problem: str, value: object, remedy: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint folder {folder}", f"must be a whole checkpoint of this model: {problem}", value, remedy
    )


def _fill(model: PolicyModel, tensors: dict[str, torch.Tensor]) -> None:
    """Fill the weights without Megatron's "extra state" of quantised layers, empty here; torch would not know it."""
    extra = "_extra_state"
    unmatched = model.load_state_dict(
        {name: tensor for name, tensor in tensors.items() if not name.endswith(extra)}, strict=False
    )
    missing = [name for name in unmatched.missing_keys if not name.endswith(extra)]
    assert not missing, f"the checkpoint left weights unfilled: {missing}"
    assert not unmatched.unexpected_keys, f"the checkpoint holds weights of no layer: {unmatched.unexpected_keys}"


def _to_save(model: PolicyModel, optimizer: Any, state: TrainerState, on_host: OnHost) -> dict[str, Any]:
    """Return a checkpoint's contents; a checkpoint of step 0 has no state of Adam, which begins with its first step."""

    def moved(value: Any) -> Any:
        if isinstance(value, ShardedTensor | ShardedTensorFactory):
            value.data = on_host(value.data)
        return value

    sharded_model = model.sharded_state_dict()
    adam = adam_state.to_save(sharded_model, optimizer, on_host) if state.optimizer_step else {}
    dict_list_map_inplace(moved, sharded_model)
    return {
        "model": sharded_model,
        "adam": adam,
        "run": asdict(state.run),
        "optimizer_step": state.optimizer_step,
        "torch_rng_state": torch.get_rng_state(),
    }
