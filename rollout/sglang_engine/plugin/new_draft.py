"""New weights of a draft, whole and checked before any rank loads them; a rank that fails has all put theirs back."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from rollout.sglang_engine.plugin.draft_copy import Copy, shared_names
from rollout.sglang_engine.plugin.drafts import NONE, OF_THE_TARGET, UNKNOWN, Draft, draft_runners
from rollout.sglang_engine.plugin.kept_draft import WEIGHTS
from rollout.sglang_engine.plugin.ranks import told_by_all
from rollout.sglang_engine.staging import expected_draft
from slime_spec.checkpoints.families.eagle3 import TABLES
from slime_spec.checkpoints.folder import DRAFT_PATH, CheckpointFolder
from slime_spec.checkpoints.model_files import DraftFiles, TargetFiles
from slime_spec.checkpoints.tensors import stored_tensors
from slime_spec.errors import PushError
from slime_spec.weights.messages import Manifest, TensorMeta
from slime_spec.weights.receive import PushReceiver, check_values

Tensors = list[tuple[str, torch.Tensor]]
Load = Callable[[Any, Tensors], None]  # into the model of a runner


class NotPutBackError(PushError):
    """A draft is neither as it was nor as the push has it."""


def replace_draft(
    updater: Any, draft: Draft, read: Callable[[], Iterable[tuple[str, torch.Tensor]]], load: Load
) -> int:
    """Loads what ``read`` gives and returns its number of tensors; raises PushError where the draft stays as it was.

    All ranks of ``updater.tp_cpu_group`` raise where one does. Raises NotPutBackError where the draft is lost.
    """
    if WEIGHTS in updater.offload_tags:
        raise PushError("the server's weights are released: resume its memory first")
    if draft.kind == UNKNOWN:
        raise PushError(draft.problem)
    if draft.kind == NONE:
        raise PushError("this server drafts without weights")
    runners, target = draft_runners(updater), updater.tp_worker.model_runner
    if methods := sorted({str(each.model_config.quantization) for each in runners if each.model_config.quantization}):
        raise PushError(f"the draft is quantized ({', '.join(methods)}): what a push loads could not be put back")
    tensors: Tensors = []
    copies: list[Copy] = []

    def check() -> None:
        tensors.extend(read())
        check_whole(tensors, draft_files(draft))
        copies.extend(Copy(runner.model, target.model) for runner in runners)

    def load_all() -> None:
        for runner in runners:
            shared = {_end(name) for name in shared_names(runner.model, target.model)}
            load(runner, [(name, tensor) for name, tensor in tensors if _end(name) not in shared])

    def put_back() -> None:
        for copy in copies:
            copy.put_back()

    agree(attempt(check), updater.tp_cpu_group)
    try:
        agree(attempt(load_all), updater.tp_cpu_group)
    except PushError as error:
        if problems := told_by_all(attempt(put_back), updater.tp_cpu_group):
            lost = "; ".join(problems)
            raise NotPutBackError(f"{error}. The draft is lost ({lost}): restart the server") from error
        raise
    return len(tensors)


def attempt(action: Callable[[], None]) -> str:
    """Runs the action and returns what went wrong in words, which other ranks must hear before anything is raised."""
    try:
        action()
    except PushError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - of SGLang's loaders and of unpickling, which a server would die of
        return f"{type(error).__name__}: {error}"
    return ""


def agree(problem: str, group: Any) -> None:
    """Raises PushError on all ranks where one has a problem."""
    if problems := told_by_all(problem, group):
        raise PushError("; ".join(problems))


def check_whole(tensors: Tensors, expected: DraftFiles) -> None:
    """Raises PushError unless the tensors are all of the draft that the server was started with, and finite."""
    metas = (TensorMeta(name, tuple(each.shape), str(each.dtype).removeprefix("torch.")) for name, each in tensors)
    manifest = Manifest("draft", 0, tuple(metas))
    PushReceiver(manifest, expected_draft(manifest, expected))
    check_values([name for name, _ in tensors], [tensor for _, tensor in tensors], torch.float32)


def draft_files(draft: Draft) -> DraftFiles:
    """What a push must bring, by the checkpoint that the draft is of: an MTP head's is the target's."""
    where = Path(draft.folder)
    if not where.is_dir():
        raise PushError(
            f"the draft's checkpoint {where} is no folder here: nothing says which tensors a push must bring"
        )
    if draft.kind == OF_THE_TARGET:
        return DraftFiles(TargetFiles.read(str(where)).mtp_shapes, in_target=True)
    stored = CheckpointFolder(where, DRAFT_PATH).tensors
    return DraftFiles({name: each.shape for name, each in stored.items() if name not in TABLES}, in_target=False)


def of_folder(folder: Path, draft: Draft) -> Tensors:
    """The draft's tensors of a checkpoint; its vocabulary must be the server's, which it reads once, at its start."""
    if draft.kind == OF_THE_TARGET:
        return list(stored_tensors(folder, draft_files(draft).shapes.__contains__, DRAFT_PATH))
    ours = Path(draft.folder)
    tables, others = (dict(stored_tensors(each, TABLES.__contains__, DRAFT_PATH)) for each in (ours, folder))
    if different := [name for name in tables if name in others and not torch.equal(tables[name], others[name])]:
        raise PushError(f"{', '.join(different)} of {folder} differs from the server's: restart it with that draft")
    return list(stored_tensors(folder, lambda name: name not in TABLES, DRAFT_PATH))


def of_request(payloads: list[Any], updater: Any) -> Tensors:
    """The tensors that a request brings: a list of them for each rank, or one for all."""
    serializer = importlib.import_module("sglang.srt.utils.common").MultiprocessingSerializer
    # Handles of CUDA memory name devices by their UUID.
    importlib.import_module("sglang.srt.utils.patch_torch").monkey_patch_torch_reductions()
    group = updater.tp_cpu_group
    rank, size = torch.distributed.get_rank(group=group), torch.distributed.get_world_size(group=group)
    if len(payloads) not in (1, size):
        raise PushError(f"serialized_named_tensors has {len(payloads)} entries for {size} ranks: send 1 or {size}")
    return list(serializer.deserialize(payloads[rank % len(payloads)]))


def _end(name: str) -> str:
    """The module and the tensor in it: "embed_tokens.weight", whatever a checkpoint and a server put before it."""
    return ".".join(name.split(".")[-2:])
