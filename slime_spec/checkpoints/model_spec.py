"""``ModelSpec`` is the architecture of a decoder that is computed here, read from its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime_spec.checkpoints.block_parts import Experts, LatentAttention
from slime_spec.checkpoints.config_keys import ANOTHER, check_keys, only
from slime_spec.checkpoints.families import BUILT_ARCHITECTURES, family_of
from slime_spec.checkpoints.families.dense import check_decoder
from slime_spec.checkpoints.folder import TARGET_PATH, CheckpointFolder, architecture_of, require
from slime_spec.checkpoints.quantization import scheme_of
from slime_spec.checkpoints.rope_settings import RopeScaling, Yarn, read_rope
from slime_spec.errors import NotComputedError


@dataclass(frozen=True)
class ModelSpec:
    """Holds shapes and switches of a decoder with RoPE, RMSNorm and SwiGLU; the families differ only here.

    Attention is grouped-query attention, or ``latent``: then ``head_dim`` is the width of a head's keys, of which there
    are as many as of queries. The first ``rotary_dim`` columns of a head are rotated (of latent attention those that
    are). ``experts`` are in place of the MLP, whose ``intermediate_size`` their dense layers have.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    rope_scaling: RopeScaling | Yarn | None
    rotary_columns: int | None = None  # of a head, where they are not all
    out_bias: bool = False  # of the attention's last matrix: of drafts alone
    latent: LatentAttention | None = None
    experts: Experts | None = None

    @property
    def rotary_dim(self) -> int:
        """Return the number of a head's columns that are rotated."""
        return self.head_dim if self.rotary_columns is None else self.rotary_columns

    @property
    def has_plain_blocks(self) -> bool:
        """Return whether all blocks are what our own kernels compute: dense, with grouped queries, heads rotated whole.

        All others are computed by torch's operators.
        """
        return self.latent is None and self.experts is None and self.rotary_dim == self.head_dim

    @classmethod
    def from_folder(cls, folder: str | Path, setting: str = TARGET_PATH) -> ModelSpec:
        """Read ``folder/config.json``; raises CheckpointError naming ``setting``, or the file and the key."""
        stored = CheckpointFolder(Path(folder), setting)
        return cls.from_dict(stored.config, stored.source)

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], source: str = "config.json", rope_kinds: tuple[str, ...] = ()
    ) -> ModelSpec:
        """Return the decoder that ``config`` describes; raises NotComputedError naming the key of another decoder.

        ``rope_kinds`` are further scalings of the rotary embedding that are computed, beside the family's.
        """
        architecture = architecture_of(config)
        family = family_of(architecture)
        if not family.is_built:
            raise NotComputedError(
                f"{source}: architectures",
                f"must be one of {', '.join(BUILT_ARCHITECTURES)}",
                architecture,
                ANOTHER,
            )
        config = {**family.defaults, **config}
        require(config, REQUIRED, source)
        model_types = filter(None, (family.model_type, family.base_model_type))
        check_keys(config, {**family.keys, "model_type": only(*model_types)}, source)
        check_decoder(config, family.keys, source)
        scheme_of(config, source)  # for its error
        kinds = tuple(dict.fromkeys((*family.rope_kinds, *rope_kinds)))
        rope_theta, rope_scaling = read_rope(config, source, kinds, family.rotary_share)
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        dense = {
            "architecture": architecture,
            "num_layers": config["num_hidden_layers"],
            "hidden_size": config["hidden_size"],
            "intermediate_size": config["intermediate_size"],
            "num_heads": heads,
            "num_kv_heads": config.get("num_key_value_heads") or heads,
            "head_dim": head_dim,
            "vocab_size": config["vocab_size"],
            "max_position_embeddings": config["max_position_embeddings"],
            "rms_norm_eps": float(config["rms_norm_eps"]),
            "rope_theta": rope_theta,
            "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
            "qkv_bias": family.qkv_bias,
            "qk_norm": family.qk_norm,
            "rope_scaling": rope_scaling,
            "rotary_columns": None if family.rotary_share == 1 else int(head_dim * family.rotary_share),
        }
        return cls(**{**dense, **family.fields(config, source)})


REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)
