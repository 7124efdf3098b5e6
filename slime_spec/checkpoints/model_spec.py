"""``ModelSpec`` is the architecture of a Llama-family checkpoint, read from its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime_spec.checkpoints.families import BUILT_ARCHITECTURES, family_of
from slime_spec.checkpoints.folder import TARGET_PATH, CheckpointFolder, architecture_of, require
from slime_spec.errors import CheckpointError


@dataclass(frozen=True)
class RopeScaling:
    """Holds the factors of Llama-3.1's frequency scaling (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelSpec:
    """Holds shapes and switches of a decoder with GQA, RoPE, RMSNorm and SwiGLU; the families differ only here."""

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
    rope_scaling: RopeScaling | None

    @classmethod
    def from_folder(cls, folder: str | Path, setting: str = TARGET_PATH) -> ModelSpec:
        """Read ``folder/config.json``; raises CheckpointError naming ``setting``, or the file and the key."""
        stored = CheckpointFolder(Path(folder), setting)
        return cls.from_dict(stored.config, stored.source)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], source: str = "config.json") -> ModelSpec:
        architecture = architecture_of(config)
        family = family_of(architecture)
        if not family.is_built:
            raise CheckpointError(
                f"{source}: architectures",
                f"must be one of {', '.join(BUILT_ARCHITECTURES)}",
                architecture,
                "Choose a checkpoint of a supported family.",
            )
        require(config, REQUIRED, source)
        # Llama's and Qwen3's bias switches also add an output bias, which nothing here knows.
        if extra := [key for key in family.refused_biases if config.get(key)]:
            raise CheckpointError(
                f"{source}: {extra[0]}",
                "must be false: such biases are not supported",
                True,
                "Choose another checkpoint.",
            )
        heads = config["num_attention_heads"]
        # transformers 5 nests theta and scaling in rope_parameters; older files have rope_theta and rope_scaling.
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        return cls(
            architecture=architecture,
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            max_position_embeddings=config["max_position_embeddings"],
            rms_norm_eps=config["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            rope_scaling=_rope_scaling(rope, source),
        )


REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)


def _rope_scaling(rope: Mapping[str, Any], source: str) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(
            f"{source}: rope_type", "must be default or llama3", kind, "Choose a checkpoint with a supported RoPE."
        )
    return RopeScaling(
        float(rope["factor"]),
        float(rope["low_freq_factor"]),
        float(rope["high_freq_factor"]),
        int(rope["original_max_position_embeddings"]),
    )
