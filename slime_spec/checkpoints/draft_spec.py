"""``DraftSpec`` describes the shape of a draft network of any family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slime_spec.algorithms import STANDALONE
from slime_spec.checkpoints.config_keys import check_keys, shown
from slime_spec.checkpoints.draft_writers import read_uniformly
from slime_spec.checkpoints.families import FORMAT_OF, family_of, format_of_family
from slime_spec.checkpoints.families.draft_format import (
    ANOTHER_DRAFT,
    DRAFT_KEYS,
    DraftFamily,
    DraftFormat,
    DraftReading,
)
from slime_spec.checkpoints.families.dspark import VANILLA
from slime_spec.checkpoints.families.family import MtpLayer
from slime_spec.checkpoints.families.llama import LLAMA
from slime_spec.checkpoints.families.nextn import OWN_LAYER
from slime_spec.checkpoints.families.qwen2 import QWEN2
from slime_spec.checkpoints.families.qwen3 import QWEN3
from slime_spec.checkpoints.folder import DRAFT_PATH, CheckpointFolder, architecture_of
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.quantization import KEY, scheme_of
from slime_spec.checkpoints.rope_settings import YARN, as_read_for_text
from slime_spec.errors import CheckpointError, NotComputedError

BIASES = "attention_bias"
OWN_EMBEDDING = "embed_tokens.weight"  # a draft's, where it does not share its target's
NORM_OUTPUT_CONVENTIONS = ("sglang", "specforge")


@dataclass(frozen=True)
class DraftSpec:
    """Describes a draft network: a projection of [token embedding, target features], then ``block.num_layers`` blocks.

    ``block`` has the draft's own sizes (its ``vocab_size`` is the target's). EAGLE-3 has ``draft_vocab_size`` output
    rows and d2t; elsewhere it equals the target's vocabulary. ``capture_layers`` are the target layers (0-based) whose
    outputs an EAGLE-3 or DFlash draft reads; the others read the state after the target's final norm. ``hidden_first``
    says that the projection's columns are [hidden; embedding] (MiMo) instead of [embedding; hidden].
    """

    family: DraftFamily
    block: ModelSpec
    target_hidden_size: int
    draft_vocab_size: int
    capture_layers: tuple[int, ...] = ()
    has_own_embedding: bool = False
    has_own_head: bool = False
    hidden_first: bool = False
    fc_bias: bool = False
    fc_norm: bool = False  # an RMSNorm per captured layer before fc
    norm_before_fc: bool = False  # one RMSNorm over all captured layers before fc
    logits_norm: bool = True  # the norm precedes the head
    recurrent_norm: bool = False  # the next step's hidden state is taken after the norm
    residual_norm: bool = False  # the first block's residual stream begins after its hidden_norm
    zero_first_embedding: bool = False  # the token embedding at position 0 is zero (MiMo)
    block_size: int = 0  # tokens that one pass of a block drafter runs over, the root and masks; 0: it drafts by steps
    drafts_from_root: bool = False  # the root's own row of a block drafts, too
    markov_rank: int = 0  # of the bias that the token before makes to a block's logits; 0: none
    markov_kind: str = VANILLA  # of MARKOV_KINDS: what else the bias depends on
    mask_token_id: int = 0  # whose embedding a block drafter reads where it drafts
    num_target_layers: int = 0  # where the config.json, or the name of an MTP layer, must say it
    in_target: bool = False  # the draft's tensors are part of the target's checkpoint

    @property
    def feature_size(self) -> int:
        """Return the width of the target features of one token."""
        return max(1, len(self.capture_layers)) * self.target_hidden_size

    @property
    def num_block_drafts(self) -> int:
        """Return the number of tokens that a block drafts; 0 for a draft that drafts by steps."""
        return self.block_size - (0 if self.drafts_from_root or not self.block_size else 1)

    @property
    def format(self) -> DraftFormat:
        """Return the names and shapes of the draft's tensors, and the keys of its config.json."""
        return format_of_family(self.family)

    @property
    def mtp_layer(self) -> MtpLayer:
        """Return the tensor names of an MTP draft: the target's own layer's, or those of the layer trained here."""
        layer = family_of(self.block.architecture).mtp or OWN_LAYER
        return replace(layer, prefix=layer.prefix_in(self.num_target_layers))

    @classmethod
    def from_folder(cls, folder: str | Path, target: ModelSpec, norm_output_convention: str = "sglang") -> DraftSpec:
        """Read ``folder/config.json``; raises CheckpointError for what cannot draft for ``target``."""
        stored = CheckpointFolder(Path(folder), DRAFT_PATH)
        config = read_uniformly(stored.config, stored.source, stored.tensors_there or ())
        return cls.from_dict(config, target, norm_output_convention, stored.source)

    @classmethod
    def from_dict(
        cls,
        config: Mapping[str, Any],
        target: ModelSpec,
        norm_output_convention: str = "sglang",
        source: str = "config.json",
    ) -> DraftSpec:
        """Return the draft that ``config`` describes.

        ``norm_output_convention`` is what EAGLE-3's ``norm_output`` means.
        """
        assert norm_output_convention in NORM_OUTPUT_CONVENTIONS, norm_output_convention
        config = read_uniformly(config, source)
        architecture = architecture_of(config)
        draft_format, layer = FORMAT_OF.get(architecture), family_of(architecture).mtp
        if draft_format is None:
            raise CheckpointError(
                f"{source}: architectures",
                f"must name a draft: {', '.join(FORMAT_OF)}",
                architecture,
                f"Correct the config.json if it is such a draft, or use {STANDALONE.name} for a whole model.",
            )
        check_keys(config, draft_format.keys if layer is not None else {**DRAFT_KEYS, **draft_format.keys}, source)
        # A draft without rope_theta rotates by 10000, whatever its target does.
        of_block = draft_format.blocks.get(architecture, architecture)
        as_model = {
            "architectures": [of_block],
            "model_type": family_of(of_block).model_type,
            "tie_word_embeddings": False,
        }
        # Engine and training rotate a draft's heads themselves: they compute a scaling that Megatron is not told of.
        if layer is None and scheme_of(config, source) is not None:
            rule = "must be left out: of drafts only the MTP layers of a target in fp8 are computed"
            raise NotComputedError(f"{source}: {KEY}", rule, shown(config[KEY]), ANOTHER_DRAFT)
        has_biases = _has_biases(config, draft_format)
        if has_biases:
            as_model["attention_bias"] = False  # of whole models none with biases of all four matrices is computed
        of_text = as_read_for_text(draft_format.block_config(config, layer, source))
        block = ModelSpec.from_dict({**of_text, **as_model}, source, (YARN,))
        if has_biases:
            block = replace(block, qkv_bias=True, out_bias=True)
        reading = DraftReading(config, block, target, layer, norm_output_convention, source)
        spec = cls(family=draft_format.family, block=block, **draft_format.fields(reading))
        _check_against_target(spec, target, source)
        return spec


def is_trainable(spec: DraftSpec) -> bool:
    """Return whether ``slime_spec.draft`` has a network of the draft's format and size."""
    if spec.block_size:
        return True
    if spec.block.num_layers != 1:
        return False
    if spec.family == "mtp":
        # A layer of another kind has no config.json of ours: it is trained where its target is.
        return spec.in_target or spec.block.has_plain_blocks
    return spec.family in ("eagle3", "eagle")


def draft_config(spec: DraftSpec) -> dict[str, Any]:
    """Return the config.json of ``spec``, as SpecForge and SGLang read it.

    An MTP draft has this project's NextN format.
    """
    block = spec.block
    config: dict[str, Any] = {
        "architectures": [],
        "model_type": family_of(block.architecture).model_type if block.out_bias else _plain_type(block),
        "hidden_size": block.hidden_size,
        "intermediate_size": block.intermediate_size,
        "num_hidden_layers": block.num_layers,
        "num_attention_heads": block.num_heads,
        "num_key_value_heads": block.num_kv_heads,
        "head_dim": block.head_dim,
        "hidden_act": "silu",
        "vocab_size": block.vocab_size,
        "max_position_embeddings": block.max_position_embeddings,
        "rms_norm_eps": block.rms_norm_eps,
        "rope_theta": block.rope_theta,
        "tie_word_embeddings": False,
    }
    if block.rope_scaling is not None:
        config["rope_scaling"] = block.rope_scaling.as_config()
    return {**config, **spec.format.config(spec), **({BIASES: True} if block.out_bias else {})}


def _plain_type(block: ModelSpec) -> str:
    return (QWEN3 if block.qk_norm else QWEN2 if block.qkv_bias else LLAMA).model_type


def _has_biases(config: Mapping[str, Any], draft_format: DraftFormat) -> bool:
    """Return whether the matrices of a draft's attention have biases, all four; a Qwen2 block has three always."""
    is_qwen2 = draft_format.blocks.get(architecture_of(config)) == QWEN2.architecture
    return bool(config.get(BIASES)) and draft_format.family != "mtp" and not is_qwen2


def _check_against_target(spec: DraftSpec, target: ModelSpec, source: str) -> None:
    if spec.block.vocab_size != target.vocab_size:
        raise CheckpointError(
            f"{source}: vocab_size", f"must be the target's ({target.vocab_size})", spec.block.vocab_size, ANOTHER_DRAFT
        )
    if spec.target_hidden_size != target.hidden_size:
        raise CheckpointError(
            f"{source}: target_hidden_size" if spec.family == "eagle3" else f"{source}: hidden_size",
            f"must be the target's hidden_size ({target.hidden_size})",
            spec.target_hidden_size,
            ANOTHER_DRAFT,
        )
    if not 0 < spec.draft_vocab_size <= target.vocab_size:
        raise CheckpointError(
            f"{source}: draft_vocab_size",
            f"must be from 1 to {target.vocab_size}",
            spec.draft_vocab_size,
            ANOTHER_DRAFT,
        )
    if not spec.has_own_head and spec.block.hidden_size != target.hidden_size:
        raise CheckpointError(
            f"{source}: draft_vocab_size",
            f"must be given: the target's head reads {target.hidden_size} columns and the draft has "
            f"{spec.block.hidden_size}, so that it needs a head of its own",
            None,
            ANOTHER_DRAFT,
        )
