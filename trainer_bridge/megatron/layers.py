"""This module says which modules the policy's decoder layers are built of, dense or with experts."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from slime_spec.checkpoints.block_parts import LATENT_EPS
from slime_spec.checkpoints.model_spec import ModelSpec
from trainer_bridge.megatron.attention import SegmentAttention
from trainer_bridge.megatron.latent_attention import SegmentLatentAttention


class RmsNorm(torch.nn.RMSNorm):
    """Normalises a sequence-parallel rank's rows, too: Megatron's own refuses to.

    Megatron sums the gradients of marked weights over tensor ranks, each of which has seen other rows.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class LatentNorm(RmsNorm):
    """Normalises latents, which have an epsilon of their own."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **kwargs: Any) -> None:
        super().__init__(config, hidden_size, LATENT_EPS)


def stage_layers(spec: ModelSpec, config: TransformerConfig) -> TransformerBlockSubmodules:
    """Return the layers of this pipeline stage, each by its place in the whole model, and the norm behind the last."""
    first = get_transformer_layer_offset(config)
    numbers = range(first, first + get_num_layers_to_build(config))
    return TransformerBlockSubmodules(
        layer_specs=[_layer(spec, has_experts=spec.experts is not None and spec.experts.serve(n)) for n in numbers],
        layer_norm=RmsNorm,
    )


def _layer(spec: ModelSpec, has_experts: bool) -> ModuleSpec:
    experts = spec.experts if has_experts else None
    layer = get_gpt_layer_local_spec(
        num_experts=None if experts is None else experts.num_experts,
        normalization="RMSNorm",
        qk_layernorm=spec.qk_norm,
        multi_latent_attention=spec.latent is not None,
    )
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RmsNorm
    attention = layer.submodules.self_attention
    attention.submodules.core_attention = SegmentAttention
    if spec.latent is not None:
        attention.module = SegmentLatentAttention
        attention.params = {**attention.params, "model": spec}
        attention.submodules.q_layernorm = attention.submodules.kv_layernorm = LatentNorm
    elif spec.qk_norm:
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = RmsNorm
    return layer
