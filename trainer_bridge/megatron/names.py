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
# Dimension along which tensor-parallel ranks hold slices; parameters not named here are whole on every rank.
SHARD_DIMS = {
    "embedding.word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "self_attention.linear_qkv.weight": 0,
    "self_attention.linear_qkv.bias": 0,
    "self_attention.linear_proj.weight": 1,
    "mlp.linear_fc1.weight": 0,
    "mlp.linear_fc2.weight": 1,
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def global_name(local_name: str, layer_offset: int) -> str:
    """Return the whole model's name of a stage's parameter; ``layer_offset`` counts the layers before the stage."""
    match = _LAYER.fullmatch(local_name)
    if match is None:
        return local_name
    return f"decoder.layers.{int(match[1]) + layer_offset}.{match[2]}"


def hf_names(name: str, spec: ModelSpec) -> tuple[str, ...]:
    """Return the Hugging Face tensors that one Megatron parameter (global name) is made of."""
    match = _LAYER.fullmatch(name)
    if match is not None:
        return tuple(f"model.layers.{match[1]}.{hf_name}" for hf_name in LAYER_NAMES[match[2]])
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
    """Return tensor-parallel rank ``rank``'s slice of a whole parameter."""
    kind = _kind(name)
    if kind not in SHARD_DIMS:
        return whole
    if kind == "mlp.linear_fc1.weight":
        # Gate and up are sliced one by one, so that each rank can multiply its gate with its up.
        return torch.cat([half.chunk(num_ranks)[rank] for half in whole.chunk(2)])
    return whole.chunk(num_ranks, dim=SHARD_DIMS[kind])[rank]


def unshard(name: str, shards: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the whole parameter from every tensor-parallel rank's slice, in rank order."""
    kind = _kind(name)
    if kind not in SHARD_DIMS or len(shards) == 1:
        return shards[0]
    if kind == "mlp.linear_fc1.weight":
        gates, ups = zip(*(part.chunk(2) for part in shards), strict=True)
        return torch.cat([*gates, *ups])
    return torch.cat(list(shards), dim=SHARD_DIMS[kind])


def is_sharded(name: str) -> bool:
    return _kind(name) in SHARD_DIMS


def _kind(name: str) -> str:
    match = _LAYER.fullmatch(name)
    return match[2] if match is not None else name


def _fuse_qkv(parts: Sequence[torch.Tensor], spec: ModelSpec) -> torch.Tensor:
    """Regroup rows (weight [rows, hidden] or bias [rows]) by key-value head: its query heads, its key, its value."""
    groups = [part.unflatten(0, (spec.num_kv_heads, -1)) for part in parts]
    return torch.cat(groups, dim=1).flatten(0, 1)


def _split_qkv(fused: torch.Tensor, spec: ModelSpec) -> list[torch.Tensor]:
    group = fused.unflatten(0, (spec.num_kv_heads, -1))
    rows = [spec.num_heads // spec.num_kv_heads * spec.head_dim, spec.head_dim, spec.head_dim]
    return [part.flatten(0, 1) for part in group.split(rows, dim=1)]
