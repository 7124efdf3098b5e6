"""``slime-spec draft convert`` writes a draft in another layout, and reads it back before it says so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import (
    OWN_EMBEDDING,
    DraftCheckpoint,
    hot_ids_of_d2t,
    load_draft,
    save_draft_checkpoint,
    vocabulary_tables,
    with_stored_embedding,
)
from slime_spec.checkpoints.draft_writers import PROJECTION, read_uniformly
from slime_spec.checkpoints.families.eagle3 import D2T, T2D
from slime_spec.checkpoints.folder import AGAIN, CONFIG, PICKLED, SINGLE, CheckpointFolder
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.speculators import BLOCK_DRAFTERS, MODEL_TYPE, UNREAD, is_of_speculators
from slime_spec.checkpoints.speculators_written import as_speculators, their_names
from slime_spec.checkpoints.tensors import EMBEDDING, HEAD, save_checkpoint, stored_tensors
from slime_spec.errors import CheckpointError
from slime_spec.launch.draft.convert_options import ConvertOptions

DRAFT = "--draft"


def convert(options: ConvertOptions) -> int:
    """Run the command; raises CheckpointError for a draft that does not load, or has no place in the layout."""
    target = ModelSpec.from_folder(options.target)
    draft = read_any(options.draft, options.target, target)
    if options.layout == "speculators":
        _write_speculators(draft, options)
    else:
        save_draft_checkpoint(options.out, draft.spec, draft.tensors, draft.hot_token_ids)
    _compare(draft, read_any(options.out, options.target, target), options.out)
    layers = ", ".join(map(str, draft.spec.capture_layers)) or "none, the final state"
    said = f"wrote {options.out}: {len(draft.tensors)} tensors as they were; outputs of layers it reads: {layers}"
    Console(stderr=True).print(said, soft_wrap=True, markup=False, highlight=False)
    return 0


def read_any(folder: Path, target_folder: Path, target: ModelSpec) -> DraftCheckpoint:
    """Read a draft of SGLang's, SpecForge's, EAGLE's or speculators' layout, in safetensors or pickled tensors."""
    config = CheckpointFolder(folder, DRAFT).config
    with TemporaryDirectory(prefix="slime-spec-draft-") as name:
        uniform = Path(name)
        tensors = _tensors(folder)
        if is_of_speculators(config) and config.get(MODEL_TYPE) in BLOCK_DRAFTERS:
            tensors = _without_copies(tensors, target_folder, folder)
        (uniform / CONFIG).write_text(json.dumps(read_uniformly(config, str(folder / CONFIG), tensors, True)))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, uniform / SINGLE)
        try:
            spec = with_stored_embedding(uniform, DraftSpec.from_folder(uniform, target), target_folder)
            return load_draft(uniform, spec)
        except CheckpointError as error:  # the copy is nobody's: the draft's own folder has the fault
            setting = error.setting.replace(str(uniform), str(folder))
            raise CheckpointError(setting, error.rule, error.value, error.remedy) from None


def _without_copies(tensors: Mapping[str, torch.Tensor], target: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Leave out what speculators keeps of the target; raises CheckpointError for another head than the target's."""
    stored = tensors.get(HEAD)
    if stored is not None:
        shared = _table(target, HEAD)
        if D2T in tensors:
            shared = shared[hot_ids_of_d2t(tensors[D2T], tensors.get(T2D), len(shared), str(folder))]
        if not torch.equal(stored, shared.to(stored.dtype)):
            raise CheckpointError(
                f"{folder}: {HEAD}",
                "must be a copy of the target's: a block drafts from it",
                "another",
                "Check --target.",
            )
    return {name: tensor for name, tensor in tensors.items() if name not in UNREAD | {HEAD}}


def _table(target: Path, name: str) -> torch.Tensor:
    """Return the target's embedding or head, which is its embedding where these are tied."""
    if name == HEAD and ModelSpec.from_folder(target).tie_word_embeddings:
        name = EMBEDDING
    ((_, table),) = stored_tensors(target, name.__eq__)
    return table


def _tensors(folder: Path) -> Mapping[str, torch.Tensor]:
    if not (folder / PICKLED).is_file() or list(folder.glob("*.safetensors")):
        return dict(stored_tensors(folder, lambda name: True, DRAFT))
    path = folder / PICKLED
    try:
        tensors: Any = torch.load(path, map_location="cpu", weights_only=True)  # nothing in it is executed
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, UnpicklingError) as error:
        problem = str(error).partition("\n")[0]
        raise CheckpointError(str(path), f"must hold tensors alone: {problem}", PICKLED, AGAIN) from None
    if not isinstance(tensors, dict) or not all(isinstance(each, torch.Tensor) for each in tensors.values()):
        raise CheckpointError(str(path), "must hold tensors by name", type(tensors).__name__, AGAIN)
    return tensors


def _write_speculators(draft: DraftCheckpoint, options: ConvertOptions) -> None:
    spec = draft.spec
    dtype = str(next(iter(draft.tensors.values())).dtype).removeprefix("torch.")
    architecture = CheckpointFolder(options.target).architecture
    config = as_speculators(spec, options.target_name or str(options.target), architecture, dtype)
    tables = vocabulary_tables(spec, draft.hot_token_ids)
    named = {**their_names(draft.tensors), **dict(tables)}
    if spec.family in BLOCK_DRAFTERS:  # whose engines read copies of what is the target's
        like = draft.tensors[PROJECTION].dtype
        named[HEAD] = _table(options.target, HEAD).to(like)
        named.setdefault(OWN_EMBEDDING, _table(options.target, EMBEDDING).to(like).clone())
    save_checkpoint(options.out, [*named.items()], config)


def _compare(before: DraftCheckpoint, after: DraftCheckpoint, out: Path) -> None:
    """Raise CheckpointError where what was written is not what was read."""
    same_ids = _ids(before).equal(_ids(after))
    same_tensors = before.tensors.keys() == after.tensors.keys() and all(
        torch.equal(tensor, after.tensors[name]) for name, tensor in before.tensors.items()
    )
    if before.spec != after.spec or not same_ids or not same_tensors:
        rule = "must be the same draft when it is read back"
        raise CheckpointError(str(out), rule, "it differs", "Report this draft, please.")


def _ids(draft: DraftCheckpoint) -> torch.Tensor:
    everything = torch.arange(draft.spec.draft_vocab_size)
    return everything if draft.hot_token_ids is None else draft.hot_token_ids
