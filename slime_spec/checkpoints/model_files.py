"""The SGLang engine reads, from its checkpoints, the shapes that a push must bring and the limits of requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slime_spec.checkpoints.draft_location import locate_draft
from slime_spec.checkpoints.families import family_of
from slime_spec.checkpoints.families.eagle3 import TABLES
from slime_spec.checkpoints.folder import DRAFT_PATH, CheckpointFolder, StoredTensor, require
from slime_spec.config.tree import Config

Shapes = Mapping[str, tuple[int, ...]]
UNBOUNDED = 2**31


@dataclass(frozen=True)
class TargetFiles:
    """Describes the policy's checkpoint. ``mtp_shapes`` are its MTP layers' tensors, the draft inside the target.

    Copies of the target's own tensors are in neither: servers do not read them.
    """

    architecture: str
    vocab_size: int
    context_length: int
    num_layers: int
    shapes: Shapes
    mtp_shapes: Shapes

    @classmethod
    def read(cls, folder: str) -> TargetFiles:
        """Read ``folder``; raises CheckpointError where a file, a key of config.json or a shard is missing."""
        stored = CheckpointFolder(Path(folder))
        config = stored.config
        require(config, ("vocab_size", "num_hidden_layers"), stored.source)
        shapes, mtp = _shapes(stored.tensors), {}
        unread = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
        if (layer := family_of(stored.architecture).mtp) is not None:
            prefix = layer.prefix_in(config["num_hidden_layers"])
            unread |= {prefix + name for name in layer.copies}  # servers have the target's own in their place
            mtp = {name: each for name, each in shapes.items() if name.startswith(prefix) and name not in unread}
        return cls(
            architecture=stored.architecture,
            vocab_size=config["vocab_size"],
            context_length=config.get("max_position_embeddings", UNBOUNDED),
            num_layers=config["num_hidden_layers"],
            shapes={name: shape for name, shape in shapes.items() if name not in mtp.keys() | unread},
            mtp_shapes=mtp,
        )


@dataclass(frozen=True)
class DraftFiles:
    """Describes the draft's weights that a push may replace; ``in_target``: they are MTP layers of the target."""

    shapes: Shapes
    in_target: bool


def draft_files(config: Config, target: TargetFiles) -> DraftFiles | None:
    """Return the draft of the configuration; None for an algorithm without weights of its own."""
    draft = locate_draft(config.speculative, config.model.hf_checkpoint)
    if draft is None:
        return None
    if draft.kind == "in_target":
        return DraftFiles(target.mtp_shapes, in_target=True)
    stored = CheckpointFolder(Path(draft.folder), DRAFT_PATH)
    shapes = {name: shape for name, shape in _shapes(stored.tensors).items() if name not in TABLES}
    return DraftFiles(shapes, in_target=False)


def _shapes(tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}
