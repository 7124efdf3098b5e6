"""This module maps Hugging Face tensors to Megatron-Core parameters (local layer spec) and back, shards too, bit exact.

Megatron                                    Hugging Face
embedding.word_embeddings.weight            model.embed_tokens.weight
decoder.layers.N.input_layernorm.weight     model.layers.N.input_layernorm.weight
  .self_attention.linear_qkv.{weight,bias}    .self_attn.{q,k,v}_proj: per key-value head [its q heads; k; v]
  .self_attention.{q,k}_layernorm.weight      .self_attn.{q,k}_norm.weight
  .self_attention.linear_proj.weight          .self_attn.o_proj.weight
  .pre_mlp_layernorm.weight                   .post_attention_layernorm.weight
  .mlp.linear_fc1.weight                      .mlp.[gate_proj; up_proj]
  .mlp.linear_fc2.weight                      .mlp.down_proj.weight
decoder.final_layernorm.weight              model.norm.weight
output_layer.weight                         lm_head.weight (the embedding, where tied)

Latent attention has, in place of linear_qkv and its norms:
  .self_attention.linear_q_down_proj.weight   .self_attn.q_a_proj.weight
  .self_attention.q_layernorm.weight          .self_attn.q_a_layernorm.weight
  .self_attention.linear_q_up_proj.weight     .self_attn.q_b_proj.weight
  .self_attention.linear_q_proj.weight        .self_attn.q_proj.weight (where queries have no latent)
  .self_attention.linear_kv_down_proj.weight  .self_attn.kv_a_proj_with_mqa.weight
  .self_attention.kv_layernorm.weight         .self_attn.kv_a_layernorm.weight
  .self_attention.linear_kv_up_proj.weight    .self_attn.kv_b_proj.weight

A layer with experts has, in place of mlp.linear_fc{1,2}:
  .mlp.router.weight                          .mlp.gate.weight
  .mlp.router.expert_bias (a buffer)          .mlp.gate.e_score_correction_bias
  .mlp.experts.local_experts.E.linear_fc{1,2} .mlp.experts.E.{[gate_proj; up_proj], down_proj}
  .mlp.shared_experts.linear_fc{1,2}          .mlp.shared_experts.{[gate_proj; up_proj], down_proj}
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from slime_spec.checkpoints.model_spec import ModelSpec

GLOBAL_NAMES = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.weight": tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
    "self_attention.linear_qkv.bias": tuple(f"self_attn.{x}_proj.bias" for x in "qkv"),
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}
LATENT_NAMES = {
    "self_attention.linear_q_down_proj.weight": ("self_attn.q_a_proj.weight",),
    "self_attention.q_layernorm.weight": ("self_attn.q_a_layernorm.weight",),
    "self_attention.linear_q_up_proj.weight": ("self_attn.q_b_proj.weight",),
    "self_attention.linear_q_proj.weight": ("self_attn.q_proj.weight",),
    "self_attention.linear_kv_down_proj.weight": ("self_attn.kv_a_proj_with_mqa.weight",),
    "self_attention.kv_layernorm.weight": ("self_attn.kv_a_layernorm.weight",),
    "self_attention.linear_kv_up_proj.weight": ("self_attn.kv_b_proj.weight",),
}
ROUTER_BIAS = "mlp.router.expert_bias"
EXPERT_NAMES = {
    "mlp.router.weight": ("mlp.gate.weight",),
    ROUTER_BIAS: ("mlp.gate.e_score_correction_bias",),
    "mlp.experts.linear_fc1.weight": ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    "mlp.experts.linear_fc2.weight": ("mlp.experts.{expert}.down_proj.weight",),
    "mlp.shared_experts.linear_fc1.weight": (
        "mlp.shared_experts.gate_proj.weight",
        "mlp.shared_experts.up_proj.weight",
    ),
    "mlp.shared_experts.linear_fc2.weight": ("mlp.shared_experts.down_proj.weight",),
}
# Dimension along which tensor-parallel ranks hold slices, of experts those of expert tensor parallelism; parameters not
# named here are whole on every rank.
SHARD_DIMS = {
    "embedding.word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "self_attention.linear_qkv.weight": 0,
    "self_attention.linear_qkv.bias": 0,
    "self_attention.linear_q_down_proj.weight": 0,
    "self_attention.linear_q_up_proj.weight": 0,
    "self_attention.linear_q_proj.weight": 0,
    "self_attention.linear_kv_down_proj.weight": 0,
    "self_attention.linear_kv_up_proj.weight": 0,
    "self_attention.linear_proj.weight": 1,
    "mlp.linear_fc1.weight": 0,
    "mlp.linear_fc2.weight": 1,
    "mlp.experts.linear_fc1.weight": 0,
    "mlp.experts.linear_fc2.weight": 1,
    "mlp.shared_experts.linear_fc1.weight": 0,
    "mlp.shared_experts.linear_fc2.weight": 1,
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(.*mlp\.experts\.)local_experts\.(\d+)\.(.+)")


def global_name(local_name: str, layer_offset: int, expert_offset: int = 0) -> str:
    """Return the whole model's name of a rank's parameter; offsets count the layers and the experts before the rank's.

    Layers are split over pipeline stages, the experts of each layer over expert parallel ranks.
    """
    match = _LAYER.fullmatch(local_name)
    if match is None:
        return local_name
    name = f"decoder.layers.{int(match[1]) + layer_offset}.{match[2]}"
    return of_peer(name, expert_offset) if is_expert(name) else name


def of_peer(name: str, num_experts: int) -> str:
    """Return the name of the same parameter of the expert ``num_experts`` further on."""
    match = _EXPERT.fullmatch(name)
    assert match is not None, f"{name} is of no expert"
    return f"{match[1]}local_experts.{int(match[2]) + num_experts}.{match[3]}"


def is_expert(name: str) -> bool:
    """Return whether the parameter is of one of several experts, between which a router chooses."""
    return _EXPERT.fullmatch(name) is not None


def hf_names(name: str, spec: ModelSpec) -> tuple[str, ...]:
    """Return the Hugging Face tensors that one Megatron parameter (global name) is made of."""
    match = _LAYER.fullmatch(name)
    if match is not None:
        expert = _EXPERT.fullmatch(name)
        table = {**LAYER_NAMES, **EXPERT_NAMES, **(LATENT_NAMES if spec.latent is not None else {})}
        parts = (each.format(expert=expert[2] if expert else "") for each in table[_kind(name)])
        return tuple(f"model.layers.{match[1]}.{part}" for part in parts)
    if name == "output_layer.weight" and spec.tie_word_embeddings:
        return ("model.embed_tokens.weight",)
    return (GLOBAL_NAMES[name],)


def from_hf(name: str, tensors: Mapping[str, torch.Tensor], spec: ModelSpec) -> torch.Tensor:
    """Return the whole Megatron parameter."""
    parts = [tensors[hf_name] for hf_name in hf_names(name, spec)]
    kind = _kind(name)
    if kind.startswith("self_attention.linear_qkv"):
        return _fuse_qkv(parts, spec)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def to_hf(name: str, whole: torch.Tensor, spec: ModelSpec) -> list[tuple[str, torch.Tensor]]:
    """Return the inverse of ``from_hf``: the named Hugging Face tensors of one whole Megatron parameter."""
    kind = _kind(name)
    if kind.startswith("self_attention.linear_qkv"):
        parts: Sequence[torch.Tensor] = _split_qkv(whole, spec)
    else:
        parts = whole.chunk(len(hf_names(name, spec)))
    return list(zip(hf_names(name, spec), parts, strict=True))


def shard(name: str, whole: torch.Tensor, rank: int, num_ranks: int) -> torch.Tensor:
    """Return the slice of a whole parameter that rank ``rank`` of those that share the parameter has."""
    kind = _kind(name)
    if kind not in SHARD_DIMS:
        return whole
    if kind.endswith("linear_fc1.weight"):
        # Gate and up are sliced one by one, so that each rank can multiply its gate with its up.
        return torch.cat([half.chunk(num_ranks)[rank] for half in whole.chunk(2)])
    return whole.chunk(num_ranks, dim=SHARD_DIMS[kind])[rank]


def unshard(name: str, shards: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the whole parameter from the slices of all ranks that share the parameter, in rank order."""
    kind = _kind(name)
    if kind not in SHARD_DIMS or len(shards) == 1:
        return shards[0]
    if kind.endswith("linear_fc1.weight"):
        gates, ups = zip(*(part.chunk(2) for part in shards), strict=True)
        return torch.cat([*gates, *ups])
    return torch.cat(list(shards), dim=SHARD_DIMS[kind])


def is_sharded(name: str) -> bool:
    return _kind(name) in SHARD_DIMS


def _kind(name: str) -> str:
    """Return the name within the layer, without an expert's number."""
    match = _LAYER.fullmatch(name)
    return name if match is None else _EXPERT.sub(r"\1\3", match[2])


def _fuse_qkv(parts: Sequence[torch.Tensor], spec: ModelSpec) -> torch.Tensor:
    """Regroup rows (weight [rows, hidden] or bias [rows]) by key-value head: its query heads, its key, its value."""
    groups = [part.unflatten(0, (spec.num_kv_heads, -1)) for part in parts]
    return torch.cat(groups, dim=1).flatten(0, 1)


def _split_qkv(fused: torch.Tensor, spec: ModelSpec) -> list[torch.Tensor]:
    group = fused.unflatten(0, (spec.num_kv_heads, -1))
    rows = [spec.num_heads // spec.num_kv_heads * spec.head_dim, spec.head_dim, spec.head_dim]
    return [part.flatten(0, 1) for part in group.split(rows, dim=1)]
