"""Count a decoder's parameters from config.json: dense or with experts, grouped-query or latent attention, MTP layers.

Names and shapes are those of the checkpoints of Llama, Qwen2, Qwen3 (and MoE), MiMo, GLM-4.5/4.6 and DeepSeek-V3/R1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slime_spec.checkpoints.families import family_of
from slime_spec.checkpoints.families.family import Family
from slime_spec.checkpoints.folder import architecture_of

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
LATENT_SIZES = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")  # configurations have three names for it
MORE_SIZES = (
    "intermediate_size",
    "moe_intermediate_size",
    "num_key_value_heads",
    "head_dim",
    "n_shared_experts",
    *EXPERTS,
)
DENSE_MTP_NORMS = 3  # MiMo: token, hidden and final, beside those of the layer
MOE_MTP_NORMS = 3  # enorm, hnorm, shared_head.norm


@dataclass(frozen=True)
class LayerParameters:
    """Counts a layer's parameters by who has them in training.

    Tensor parallel ranks split ``split``; each has ``whole`` (norms, a router). Experts that a router chooses from are
    spread in another way. ``corrections`` are a router's biases, which are stored and not trained.
    """

    split: int
    whole: int
    experts: int = 0
    corrections: int = 0

    @property
    def total(self) -> int:
        return self.split + self.whole + self.experts + self.corrections

    def __add__(self, other: LayerParameters) -> LayerParameters:
        return LayerParameters(
            self.split + other.split,
            self.whole + other.whole,
            self.experts + other.experts,
            self.corrections + other.corrections,
        )


@dataclass(frozen=True)
class Parameters:
    """Counts parameters: ``decoder`` without MTP layers, ``mtp`` of those, ``mtp_copies`` repeated in a file.

    ``tables`` are the decoder's embedding and head, ``attention`` is the attention of all its layers. ``layers`` are
    the decoder's, and ``mtp_experts`` the experts of its MTP layers.
    """

    decoder: int
    mtp: int
    mtp_copies: int
    tables: int
    attention: int
    layers: tuple[LayerParameters, ...]
    mtp_experts: int = 0

    @property
    def stored(self) -> int:
        return self.decoder + self.mtp + self.mtp_copies


def count_parameters(config: Mapping[str, Any]) -> Parameters | None:
    """Return the parameters of the model; None for a config.json that does not give the sizes of a decoder."""
    if not _has_sizes(config) or not isinstance(_mlp_width(config), int):
        return None
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    family = family_of(architecture_of(config))
    tables = vocab * hidden * (1 if config.get("tie_word_embeddings") else 2)
    attention = _attention(config, family) + LayerParameters(0, 2 * hidden)  # and the layer's two norms
    dense, experts = attention + _dense_mlp(config), attention + _expert_mlp(config)
    layers = tuple(
        experts if layer_has_experts(config, layer) else dense for layer in range(config["num_hidden_layers"])
    )
    num_mtp = int(config.get("num_nextn_predict_layers") or 0)
    norms = MOE_MTP_NORMS if num_experts(config) else DENSE_MTP_NORMS
    mtp = experts if num_experts(config) else dense
    copies = len(family.mtp.copies) * vocab * hidden if family.mtp else 0
    return Parameters(
        decoder=tables + hidden + sum(layer.total for layer in layers),
        mtp=num_mtp * (mtp.total + 2 * hidden * hidden + norms * hidden),
        mtp_copies=num_mtp * copies,
        tables=tables,
        attention=len(layers) * _attention(config, family).total,
        layers=layers,
        mtp_experts=num_mtp * mtp.experts,
    )


def has_latent_attention(config: Mapping[str, Any]) -> bool:
    return bool(config.get("kv_lora_rank"))


def expanded_kv_elements(config: Mapping[str, Any], num_layers: int | None = None) -> int | None:
    """Count numbers cached per position where every head has a key and a value as wide, as the embedded engine's."""
    if not has_latent_attention(config):
        return kv_elements_per_token(config, num_layers)
    if not _has_sizes(config):
        return None
    layers = config["num_hidden_layers"] if num_layers is None else num_layers
    width = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    return int(layers * 2 * config["num_attention_heads"] * width)


def kv_elements_per_token(config: Mapping[str, Any], num_layers: int | None = None) -> int | None:
    """Count numbers cached per position in all layers: keys and values per head, or the latent and its rotary part."""
    if not _has_sizes(config):
        return None
    layers = config["num_hidden_layers"] if num_layers is None else num_layers
    if config.get("kv_lora_rank"):
        return int(layers * (config["kv_lora_rank"] + config["qk_rope_head_dim"]))
    return int(layers * 2 * num_kv_heads(config) * head_dim(config))


def _has_sizes(config: Mapping[str, Any]) -> bool:
    """Return whether every size is a number: some families have a list of sizes by layer, or other names for them."""
    needed = [*SIZES, *(LATENT_SIZES if config.get("kv_lora_rank") else ())]
    are_there = all(isinstance(config.get(key), int) and config[key] > 0 for key in needed)
    return are_there and not any(isinstance(config.get(key), list) for key in MORE_SIZES)


def _mlp_width(config: Mapping[str, Any]) -> Any:
    """Return the width of an expert, if there are experts; Mixtral names it as others name a dense layer's width."""
    dense = _dense_width(config)
    width = config.get("moe_intermediate_size") or dense if num_experts(config) else dense
    return width or None


def _dense_width(config: Mapping[str, Any]) -> Any:
    return config.get("intermediate_size") or 0


def num_kv_heads(config: Mapping[str, Any]) -> int:
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def num_experts(config: Mapping[str, Any]) -> int:
    """Return how many experts a router chooses from; 0 of a model without experts."""
    return int(next((config[name] for name in EXPERTS if config.get(name)), 0))


def expert_width(config: Mapping[str, Any]) -> int:
    """Return the columns of an expert."""
    return int(_mlp_width(config))


def layer_has_experts(config: Mapping[str, Any], layer: int) -> bool:
    """Return whether a layer (0-based) has experts in place of an MLP."""
    if not num_experts(config):
        return False
    is_left_out = layer < int(config.get("first_k_dense_replace") or 0) or layer in (
        config.get("mlp_only_layers") or ()
    )
    return not is_left_out and not (layer + 1) % int(config.get("decoder_sparse_step") or 1)


def _attention(config: Mapping[str, Any], family: Family) -> LayerParameters:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if config.get("kv_lora_rank"):
        return _latent_attention(config)
    dim, kv_heads = head_dim(config), num_kv_heads(config)
    rows = (heads + 2 * kv_heads) * dim
    biases = rows if family.qkv_bias or config.get("attention_bias") else 0
    norms = 2 * dim if family.qk_norm or config.get("use_qk_norm") else 0
    return LayerParameters(rows * hidden + heads * dim * hidden + biases, norms)


def _latent_attention(config: Mapping[str, Any]) -> LayerParameters:
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    query_rank = config.get("q_lora_rank") or 0
    queries = (query_rank or hidden) * heads * (nope + rope) + hidden * query_rank
    keys = hidden * (rank + rope) + rank * heads * (nope + value)
    return LayerParameters(queries + keys + heads * value * hidden, query_rank + rank)


def _dense_mlp(config: Mapping[str, Any]) -> LayerParameters:
    return LayerParameters(3 * config["hidden_size"] * _dense_width(config), 0)


def _expert_mlp(config: Mapping[str, Any]) -> LayerParameters:
    hidden, experts = config["hidden_size"], num_experts(config)
    if not experts:
        return LayerParameters(0, 0)
    of_one = 3 * hidden * _mlp_width(config)
    # DeepSeek's and GLM's router also has a bias per expert that corrects its scores.
    corrections = experts if config.get("n_routed_experts") else 0
    return LayerParameters(
        (config.get("n_shared_experts") or 0) * of_one, experts * hidden, experts * of_one, corrections
    )
