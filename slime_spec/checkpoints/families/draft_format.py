"""The formats of draft checkpoints differ in keys of config.json, names of tensors and shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from slime_spec.checkpoints.config_keys import Keys, flag, only
from slime_spec.checkpoints.families.dense import Shapes
from slime_spec.checkpoints.families.family import MtpLayer

if TYPE_CHECKING:
    from slime_spec.checkpoints.draft_spec import DraftSpec
    from slime_spec.checkpoints.model_spec import ModelSpec

# What changes a draft's numbers in an engine or a trainer, whatever its format, and leaves no trace in its tensors.
DRAFT_KEYS: Keys = {
    "attention_bias": flag(),
    **dict.fromkeys(("rope_is_neox_style", "is_neox_style"), only(True, why="SGLang rotates neighbours then")),
    "logits_mup_width_multiplier": only(1, why="of Inkling's targets, which are not computed"),
    "position_embedding_type": only("rope", why="ModelOpt's"),
    "eagle_decoder_type": only("llama", why="ModelOpt's"),
}
DraftFamily = Literal["eagle", "eagle3", "mtp", "dflash", "dspark"]
ANOTHER_DRAFT = "Pass --sglang-speculative-draft-model-path with a draft made for this target."


@dataclass(frozen=True)
class DraftReading:
    """Holds a draft's config.json while a DraftSpec is made from it; ``source`` names the config.json in errors.

    ``layer`` is the MTP layer of a target's own checkpoint. ``convention`` is what EAGLE-3's ``norm_output`` means:
    SGLang's reading or SpecForge's.
    """

    config: Mapping[str, Any]
    block: ModelSpec
    target: ModelSpec
    layer: MtpLayer | None
    convention: str
    source: str


def _whole_config(config: Mapping[str, Any], layer: MtpLayer | None, source: str) -> Mapping[str, Any]:
    return config


@dataclass(frozen=True)
class DraftFormat:
    """Describes one format of draft checkpoints. Names are SpecForge's and SGLang's.

    ``blocks`` has config.json's architectures and for each that of the draft's decoder block; ``served`` are further
    architectures of the format that SGLang alone reads. ``block_config`` gives the block's config.json, and raises
    CheckpointError for a draft that the embedded engine cannot run. ``fields`` are those of the DraftSpec beyond family
    and block, ``keys`` the keys of config.json that they read, and ``nested_keys`` those of objects in it. ``shapes``
    are the trainable tensors but shared embedding and head, ``config`` the keys of config.json beyond the block's.
    ``renamed`` maps beginnings of names that some files use to ours. ``optional`` tensors are zero where a file lacks
    them; those for which ``is_unread`` are left aside, as SGLang does. ``num_own_parameters`` counts the draft's
    parameters beyond its decoder block from config.json alone, ``num_captured`` the target's layers that it reads, and
    ``num_block_drafts`` the tokens that a block drafter drafts at once, None where a damaged file does not say it.
    """

    family: DraftFamily
    blocks: Mapping[str, str]
    fields: Callable[[DraftReading], dict[str, Any]]
    shapes: Callable[[DraftSpec], Shapes]
    config: Callable[[DraftSpec], dict[str, Any]]
    is_unread: Callable[[str, DraftSpec], bool]
    block_config: Callable[[Mapping[str, Any], MtpLayer | None, str], Mapping[str, Any]] = _whole_config
    served: tuple[str, ...] = ()
    drops_model_prefix: bool = True
    renamed: Mapping[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    has_tables: bool = False
    num_own_parameters: Callable[[Mapping[str, Any]], int] | None = None
    num_block_drafts: Callable[[Mapping[str, Any]], int | None] | None = None
    num_captured: Callable[[Mapping[str, Any]], int] | None = None
    keys: Keys = field(default_factory=dict)
    nested_keys: Mapping[str, Keys] = field(default_factory=dict)

    def canonical_name(self, stored: str) -> str:
        """Return our name of a tensor that its file calls ``stored``."""
        name = stored.removeprefix("model.") if self.drops_model_prefix else stored
        for old, new in self.renamed.items():
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name
