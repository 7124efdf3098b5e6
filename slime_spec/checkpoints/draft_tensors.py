"""This module reads draft checkpoints of any writer under one set of names, and writes them for SGLang.

Names are SpecForge's and SGLang's; the draft's format knows which other names a file may use
(``slime_spec.checkpoints.families``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from slime_spec.checkpoints.draft_spec import OWN_EMBEDDING, DraftSpec, draft_config
from slime_spec.checkpoints.families.eagle3 import D2T, T2D, TABLES
from slime_spec.checkpoints.folder import DRAFT_PATH, CheckpointFolder
from slime_spec.checkpoints.fp8 import Fp8Weight
from slime_spec.checkpoints.tensors import EMBEDDING, Dtypes, check_tensor, save_checkpoint, stored_tensors, weights
from slime_spec.errors import CheckpointError

MEND = "Copy the draft again, or correct its config.json."


@dataclass(frozen=True)
class DraftCheckpoint:
    """Holds a draft's own weights in the file's dtype, under the names of ``draft_shapes``.

    ``hot_token_ids`` [draft vocab] int64 are the target ids of the head's rows, ascending; None means all of them.
    """

    spec: DraftSpec
    tensors: dict[str, torch.Tensor]
    hot_token_ids: torch.Tensor | None = None


def draft_shapes(spec: DraftSpec) -> dict[str, tuple[int, ...]]:
    """Return every trainable tensor of the draft itself, in file order.

    Shared embedding and head are not among them.
    """
    shapes = spec.format.shapes(spec)
    if spec.has_own_embedding:
        shapes[OWN_EMBEDDING] = (spec.block.vocab_size, spec.block.hidden_size)
    if spec.has_own_head:
        shapes["lm_head.weight"] = (spec.draft_vocab_size, spec.block.hidden_size)
    return shapes


def load_draft(folder: str | Path, spec: DraftSpec, dtypes: Dtypes = ()) -> DraftCheckpoint:
    """Read the draft; raises CheckpointError naming what is missing, unknown, misshapen, not finite or mapped wrong."""
    folder, wanted = Path(folder), draft_shapes(spec)
    tensors = dict(_checked_tensors(folder, spec, dtypes))
    hot_token_ids = _hot_token_ids(folder, spec, tensors)
    for name in spec.format.optional & wanted.keys() - tensors.keys():
        tensors[name] = torch.zeros(wanted[name], dtype=next(iter(tensors.values())).dtype)
    return DraftCheckpoint(spec, {name: tensors[name] for name in wanted}, hot_token_ids)


def with_stored_embedding(folder: Path, spec: DraftSpec, target: Path) -> DraftSpec:
    """Return ``spec``, with an embedding of its own if the draft's file has another one than the target's.

    Files often hold a copy of the target's embedding; the draft then shares the target's, as it is pushed.
    """
    if spec.has_own_embedding or spec.in_target:
        return spec
    stored = {
        spec.format.canonical_name(name): (name, each)
        for name, each in CheckpointFolder(folder, DRAFT_PATH).tensors.items()
    }
    name, header = stored.get(OWN_EMBEDDING, ("", None))
    if header is None or header.shape != (spec.block.vocab_size, spec.block.hidden_size):
        return spec
    if EMBEDDING not in CheckpointFolder(target).tensors:
        return spec  # whoever loads the target refuses it
    (_, own), *_ = stored_tensors(folder, name.__eq__, DRAFT_PATH)
    (_, shared), *_ = stored_tensors(target, EMBEDDING.__eq__)
    is_copy = own.shape == shared.shape and torch.equal(own, shared.to(own.dtype))
    return spec if is_copy else replace(spec, has_own_embedding=True)


def verify_draft(folder: str | Path, spec: DraftSpec, dtypes: Dtypes = ()) -> None:
    """Check as ``load_draft`` does, with one tensor in memory at a time, the tables of the vocabulary apart."""
    folder = Path(folder)
    checked = _checked_tensors(folder, spec, dtypes)
    _hot_token_ids(folder, spec, {name: table for name, table in checked if name in TABLES})


def save_draft_checkpoint(
    folder: str | Path,
    spec: DraftSpec,
    tensors: Mapping[str, torch.Tensor],
    hot_token_ids: torch.Tensor | None = None,
) -> None:
    """Write config.json and model.safetensors as SpecForge exports them; ``load_draft`` and SGLang read them back.

    ``tensors`` are those of ``draft_shapes(spec)``. ``hot_token_ids`` is needed where the draft has a reduced
    vocabulary; d2t (as offsets) and t2d are made from it. An MTP draft becomes a folder of its own.
    """
    wanted = draft_shapes(spec)
    assert tensors.keys() == wanted.keys(), f"tensors differ: {sorted(tensors.keys() ^ wanted.keys())}"
    for name, shape in wanted.items():
        assert tuple(tensors[name].shape) == shape, f"{name} has shape {tuple(tensors[name].shape)}, not {shape}"
    stored = [(name, tensors[name]) for name in wanted]
    stored += vocabulary_tables(spec, hot_token_ids)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    save_checkpoint(folder, stored, {**draft_config(spec), "torch_dtype": dtype})


def vocabulary_tables(spec: DraftSpec, hot_token_ids: torch.Tensor | None) -> list[tuple[str, torch.Tensor]]:
    """Return d2t (as offsets) and t2d as files have them; nothing for a draft that shares the target's head."""
    if hot_token_ids is None and not spec.has_own_head:
        return []
    if hot_token_ids is None:
        hot_token_ids = torch.arange(spec.block.vocab_size)  # SpecForge wants the tables of a full vocabulary too
    assert tuple(hot_token_ids.shape) == (spec.draft_vocab_size,), "one target id for every row of the head"
    assert bool((hot_token_ids.diff() > 0).all()), "target ids ascend"
    in_draft = torch.zeros(spec.block.vocab_size, dtype=torch.bool)
    in_draft[hot_token_ids] = True
    offsets = hot_token_ids.to(torch.int64) - torch.arange(spec.draft_vocab_size)
    return [(D2T, offsets), (T2D, in_draft)]


def hot_ids_of_d2t(d2t: torch.Tensor, t2d: torch.Tensor | None, vocab_size: int, source: str = "") -> torch.Tensor:
    """Return the target ids [draft vocab] that ``d2t`` stands for, whichever of its two conventions the file follows.

    Offset (EAGLE, SpecForge, SGLang): row i is token i + d2t[i]. Absolute (RTP-LLM): row i is token d2t[i]. Rows
    ascend in both. ``t2d`` [vocab] decides where it is given; without it the values must fit one convention only.
    """
    d2t = d2t.to(torch.int64)
    readings = {"offset": d2t + torch.arange(d2t.shape[0]), "absolute": d2t}
    if t2d is not None:
        used = t2d.to(torch.bool).nonzero().squeeze(1)
        fitting = [ids for ids in readings.values() if torch.equal(ids, used)]
    else:
        fitting = [ids for ids in readings.values() if _are_token_ids(ids, vocab_size)]
        if len(fitting) == 2:
            raise CheckpointError(
                f"{source}: {D2T}",
                "must fit one convention only, and reads as offsets and as token ids alike",
                f"{d2t[:4].tolist()}...",
                f"Keep {T2D} in the checkpoint: it says which it is.",
            )
    if not fitting:
        rule = (
            f"must give the tokens that {T2D} marks"
            if t2d is not None
            else f"must give ascending ids below {vocab_size}"
        )
        raise CheckpointError(
            f"{source}: {D2T}",
            f"{rule}, as offsets (token = row + d2t, SpecForge and SGLang) or as token ids (RTP-LLM)",
            f"{d2t[:4].tolist()}...",
            "Export the draft again.",
        )
    return fitting[0]


def _are_token_ids(ids: torch.Tensor, vocab_size: int) -> bool:
    return bool(ids[0] >= 0) and bool(ids[-1] < vocab_size) and bool((ids.diff() > 0).all())


def _checked_tensors(folder: Path, spec: DraftSpec, dtypes: Dtypes) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the draft's tensors and its tables one by one, under their canonical names; from fp8 in fp32.

    Raises after the last tensor.
    """
    wanted = draft_shapes(spec)
    seen: set[str] = set()
    unknown: list[str] = []
    prefix = spec.mtp_layer.prefix if spec.in_target else ""
    for stored, read in weights(folder, lambda name: name.startswith(prefix), DRAFT_PATH):
        tensor = read.dequantised() if isinstance(read, Fp8Weight) else read
        name = spec.format.canonical_name(stored)
        if name in TABLES and spec.format.has_tables:
            yield name, tensor
        elif name in wanted:
            if name in seen:
                raise CheckpointError(f"{folder}: {stored}", f"must be there once, and {name} is it too", stored, MEND)
            check_tensor(folder, stored, tensor, wanted[name], dtypes)
            seen.add(name)
            yield name, tensor
        elif not _is_unread(name, spec):
            unknown.append(stored)
    for name in wanted:
        if name not in seen | spec.format.optional:
            raise CheckpointError(f"{folder}: {name}", "must be in the draft's checkpoint", "missing", MEND)
    if unknown:
        raise CheckpointError(
            f"{folder}: {unknown[0]}", "is no tensor of this kind of draft", f"{len(unknown)} unknown tensors", MEND
        )


def _hot_token_ids(folder: Path, spec: DraftSpec, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    tables = {name: tensors[name] for name in TABLES if name in tensors}
    sizes = {D2T: spec.draft_vocab_size, T2D: spec.block.vocab_size}
    for name, table in tables.items():
        if table.is_floating_point() or table.is_complex():
            dtype = str(table.dtype).removeprefix("torch.")
            raise CheckpointError(f"{folder}: {name}", "must hold whole numbers", dtype, MEND)
        if tuple(table.shape) != (sizes[name],):
            raise CheckpointError(f"{folder}: {name}", f"must have shape {(sizes[name],)}", tuple(table.shape), MEND)
    if D2T not in tables:
        if spec.draft_vocab_size < spec.block.vocab_size:
            raise CheckpointError(
                f"{folder}: {D2T}", "must map the draft's reduced vocabulary to the target's", "missing", MEND
            )
        return None
    ids = hot_ids_of_d2t(tables[D2T], tables.get(T2D), spec.block.vocab_size, str(folder))
    return None if ids.shape[0] == spec.block.vocab_size else ids


def _is_unread(name: str, spec: DraftSpec) -> bool:
    """Return whether SGLang too ignores this tensor: a copy of the target's, a buffer, an unused norm."""
    if name.endswith("rotary_emb.inv_freq") or name == OWN_EMBEDDING:
        return True
    return spec.format.is_unread(name, spec)
