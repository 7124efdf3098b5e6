"""The architecture of a Llama-family checkpoint, read from its config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime_spec.errors import CheckpointError


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1's frequency scaling (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelSpec:
    """Shapes and switches of a decoder with GQA, RoPE, RMSNorm and SwiGLU; the supported families differ only here."""

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
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelSpec:
        """Read ``folder/config.json``; raises CheckpointError naming the file and the key."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise CheckpointError(
                "model.hf_checkpoint",
                "must be a Hugging Face checkpoint folder with a config.json",
                str(folder),
                "Pass --hf-checkpoint DIR, or make one with: slime-spec models fetch smollm2-135m",
            )
        try:
            config = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise CheckpointError(
                str(path), f"must be valid JSON: {error}", path.name, "Copy the checkpoint again."
            ) from None
        return cls.from_dict(config, source=str(path))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], source: str = "config.json") -> ModelSpec:
        architecture = (config.get("architectures") or ["?"])[0]
        if architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{source}: architectures",
                f"must be one of {', '.join(ARCHITECTURES)}",
                architecture,
                "Choose a checkpoint of a supported family.",
            )
        missing = [key for key in REQUIRED if config.get(key) is None]
        if missing:
            raise CheckpointError(source, f"lacks {', '.join(missing)}", architecture, "Copy the checkpoint again.")
        # Llama's and Qwen3's bias switches also add an output bias, which nothing here knows; Qwen2 and MiMo have q, k
        # and v biases only, and MiMo's configuration says so with the same switch.
        switches = ("mlp_bias",) if architecture == "MiMoForCausalLM" else ("attention_bias", "mlp_bias")
        if extra := [key for key in switches if config.get(key)]:
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
            qkv_bias=architecture in ("Qwen2ForCausalLM", "MiMoForCausalLM"),
            qk_norm=architecture == "Qwen3ForCausalLM",
            rope_scaling=_rope_scaling(rope, source),
            eos_token_ids=_token_ids(config.get("eos_token_id")),
        )


# MiMo's decoder is Qwen2's; its MTP layer is a draft's (slime_spec.draft).
ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MiMoForCausalLM")
REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


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
