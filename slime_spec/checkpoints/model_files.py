"""What the checkpoint folders of target and draft say, for any architecture: read from config.json and file headers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from slime_spec.checkpoints.end_tokens import eos_ids, listed
from slime_spec.checkpoints.families import MTP_FAMILIES
from slime_spec.checkpoints.file_names import INDEX, SINGLE
from slime_spec.checkpoints.shipped import BUILTIN, builtin_folder
from slime_spec.config.tree import Config, SpeculativeConfig
from slime_spec.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
TABLES = ("d2t", "t2d")  # constants of a reduced vocabulary, which SGLang reads once, at its start


@dataclass(frozen=True)
class TargetFiles:
    """The policy's checkpoint. ``mtp_shapes`` are the tensors of its MTP layers, which are a draft inside it."""

    architecture: str
    vocab_size: int
    context_length: int
    num_layers: int
    eos_token_ids: frozenset[int]
    shapes: Shapes
    mtp_shapes: Shapes

    @classmethod
    def read(cls, folder: str) -> TargetFiles:
        config = read_config(folder)
        stored = stored_shapes(folder)
        prefix = mtp_prefix(config)
        mtp = {name: shape for name, shape in stored.items() if prefix and name.startswith(prefix)}
        text = config.get("text_config", config)
        return cls(
            architecture=read_architecture(folder),
            vocab_size=text["vocab_size"],
            context_length=text.get("max_position_embeddings", 2**31),
            num_layers=text["num_hidden_layers"],
            eos_token_ids=eos_ids(folder, listed(text.get("eos_token_id", config.get("eos_token_id")))),
            shapes={name: shape for name, shape in stored.items() if name not in mtp and not _is_tied_head(name, text)},
            mtp_shapes=mtp,
        )


@dataclass(frozen=True)
class DraftFiles:
    """The draft's weights that a push may replace; ``in_target`` says that they are MTP layers of the target."""

    shapes: Shapes
    in_target: bool
    is_reduced: bool


def draft_files(config: Config, target: TargetFiles) -> DraftFiles | None:
    """The draft of the configuration; None for an algorithm without weights of its own."""
    speculative = config.speculative
    if speculative.algorithm in ("NONE", "NGRAM", "LOOKUP"):
        return None
    folder = draft_folder(speculative)
    own = folder is None or Path(folder).resolve() == Path(config.model.hf_checkpoint).resolve()
    if folder is None or (own and speculative.algorithm != "STANDALONE"):
        return DraftFiles(target.mtp_shapes, in_target=True, is_reduced=False)
    draft = read_config(folder)
    reduced = draft.get("draft_vocab_size", target.vocab_size) not in (None, target.vocab_size)
    shapes = {name: shape for name, shape in stored_shapes(folder).items() if name not in TABLES}
    return DraftFiles(shapes, in_target=False, is_reduced=reduced)


def draft_folder(config: SpeculativeConfig) -> str | None:
    """The folder that the settings name, that of a draft which ships with the package too."""
    path = config.draft_model_path
    return str(builtin_folder(path)) if path is not None and path.startswith(BUILTIN) else path


def read_config(folder: str) -> dict[str, Any]:
    path = Path(folder) / "config.json"
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(str(path), f"must be readable: {error}", folder, "Pass a checkpoint folder.") from None
    return data


def read_architecture(folder: str) -> str:
    return str((read_config(folder).get("architectures") or ["?"])[0])


def mtp_prefix(config: Mapping[str, Any]) -> str:
    """What the names of a target's MTP layer begin with; nothing where it has none."""
    family = MTP_FAMILIES.get((config.get("architectures") or ["?"])[0])
    return "" if family is None else family.prefix.replace("{layers}", str(config.get("num_hidden_layers", "")))


def stored_shapes(folder: str) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape, from the files' headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _files(Path(folder)):
        try:
            with safe_open(path, framework="pt") as shard:
                shapes |= {name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                str(path), f"must be a whole safetensors file: {error}", folder, "Copy it again."
            ) from None
    return shapes


def _files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        names = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        return [folder / name for name in sorted(names)]
    raise CheckpointError(str(folder), f"must hold {SINGLE} or {INDEX}", folder.name, "Pass a checkpoint folder.")


def _is_tied_head(name: str, config: Mapping[str, Any]) -> bool:
    return name == "lm_head.weight" and bool(config.get("tie_word_embeddings"))
