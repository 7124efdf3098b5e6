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
class Parameters:
    """Counts parameters: ``decoder`` without MTP layers, ``mtp`` of those, ``mtp_copies`` repeated in a file.

    ``tables`` are the decoder's embedding and head, ``attention`` is the attention of all its layers, ``experts`` are
    those that its routers choose from.
    """

    decoder: int
    mtp: int
    mtp_copies: int
    tables: int
    attention: int
    experts: int = 0

    @property
    def stored(self) -> int:
        return self.decoder + self.mtp + self.mtp_copies


def count_parameters(config: Mapping[str, Any]) -> Parameters | None:
    """Return the parameters of the model; None for a config.json that does not give the sizes of a decoder."""
    if not _has_sizes(config) or not isinstance(_mlp_width(config), int):
        return None
    hidden, layers, vocab = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
    family = family_of(architecture_of(config))
    dense = _num_dense_layers(config)
    tables = vocab * hidden * (1 if config.get("tie_word_embeddings") else 2)
    attention = layers * _attention(config, family)
    decoder = (
        tables
        + hidden
        + attention
        + layers * 2 * hidden
        + dense * _dense_mlp(config)
        + (layers - dense) * _expert_mlp(config)
    )
    num_mtp = int(config.get("num_nextn_predict_layers") or 0)
    norms = MOE_MTP_NORMS if _num_experts(config) else DENSE_MTP_NORMS
    mlp = _expert_mlp(config) if _num_experts(config) else _dense_mlp(config)
    layer = _attention(config, family) + 2 * hidden + mlp + 2 * hidden * hidden + norms * hidden
    copies = len(family.mtp.copies) * vocab * hidden if family.mtp else 0
    experts = (layers - dense) * _num_experts(config) * _one_expert(config)
    return Parameters(decoder, num_mtp * layer, num_mtp * copies, tables, attention, experts)


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
    width = config.get("moe_intermediate_size") or dense if _num_experts(config) else dense
    return width or None


def _dense_width(config: Mapping[str, Any]) -> Any:
    return config.get("intermediate_size") or 0


def num_kv_heads(config: Mapping[str, Any]) -> int:
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _num_experts(config: Mapping[str, Any]) -> int:
    return int(next((config[name] for name in EXPERTS if config.get(name)), 0))


def _num_dense_layers(config: Mapping[str, Any]) -> int:
    if not _num_experts(config):
        return int(config["num_hidden_layers"])
    return int(config.get("first_k_dense_replace") or len(config.get("mlp_only_layers") or ()))


def _attention(config: Mapping[str, Any], family: Family) -> int:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if config.get("kv_lora_rank"):
        return _latent_attention(config)
    dim, kv_heads = head_dim(config), num_kv_heads(config)
    rows = (heads + 2 * kv_heads) * dim
    biases = rows if family.qkv_bias or config.get("attention_bias") else 0
    norms = 2 * dim if family.qk_norm or config.get("use_qk_norm") else 0
    return int(rows * hidden + heads * dim * hidden + biases + norms)


def _latent_attention(config: Mapping[str, Any]) -> int:
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    query_rank = config.get("q_lora_rank")
    if query_rank:
        queries = hidden * query_rank + query_rank + query_rank * heads * (nope + rope)
    else:
        queries = hidden * heads * (nope + rope)
    keys = hidden * (rank + rope) + rank + rank * heads * (nope + value)
    return int(queries + keys + heads * value * hidden)


def _dense_mlp(config: Mapping[str, Any]) -> int:
    return int(3 * config["hidden_size"] * _dense_width(config))


def _expert_mlp(config: Mapping[str, Any]) -> int:
    experts = _num_experts(config)
    if not experts:
        return 0
    hidden = config["hidden_size"]
    # DeepSeek's and GLM's router also has a bias per expert that corrects its scores.
    correction = experts if config.get("n_routed_experts") else 0
    num_mlps = experts + (config.get("n_shared_experts") or 0)
    return int(num_mlps * _one_expert(config) + experts * hidden + correction)


def _one_expert(config: Mapping[str, Any]) -> int:
    return int(3 * config["hidden_size"] * _mlp_width(config))
