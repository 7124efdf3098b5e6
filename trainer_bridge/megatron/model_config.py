"""This module gives Megatron's description of a model and of how its ranks share it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from slime_spec.checkpoints.block_parts import Experts, LatentAttention
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.tree import TrainerConfig


def transformer_config(spec: ModelSpec, trainer: TrainerConfig) -> TransformerConfig:
    """Return Megatron's description of the model and of how its ranks share it."""
    dtype = getattr(torch, trainer.dtype)
    fields: dict[str, Any] = {}
    if trainer.recompute:
        fields |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if spec.experts is not None:
        fields |= _experts(spec.experts, spec.num_layers, trainer)
    if spec.latent is not None:
        fields |= _latent(spec.latent)
    kind = TransformerConfig if spec.latent is None else MLATransformerConfig
    return kind(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.intermediate_size,
        num_attention_heads=spec.num_heads,
        num_query_groups=spec.num_kv_heads,
        kv_channels=spec.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=spec.rms_norm_eps,
        qk_layernorm=spec.qk_norm or spec.latent is not None,
        add_qkv_bias=spec.qkv_bias,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=trainer.tensor_model_parallel_size,
        pipeline_model_parallel_size=trainer.pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=trainer.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=trainer.num_layers_in_last_pipeline_stage,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=not torch.cuda.is_available(),
        # Every weight must come from a checkpoint: one that does not stays NaN and shows at once.
        init_method=_fill_with_nan,
        output_layer_init_method=_fill_with_nan,
        # The loss is a sum over tokens; Megatron divides gradients by the token count of all ranks and microbatches.
        calculate_per_token_loss=True,
        batch_p2p_comm=False,
        variable_seq_lengths=True,
        # Megatron refuses variable_seq_lengths with its default dispatcher, even for dense models.
        moe_token_dispatcher_type="alltoall",
        # Fusions that need CUDA extensions.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        **fields,
    )


def _fill_with_nan(weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.init.constant_(weight, math.nan)


def _experts(experts: Experts, num_layers: int, trainer: TrainerConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "num_moe_experts": experts.num_experts,
        "moe_router_topk": experts.num_per_token,
        "moe_ffn_hidden_size": experts.width,
        "moe_shared_expert_intermediate_size": experts.num_shared * experts.width or None,
        "moe_layer_freq": [int(experts.serve(layer)) for layer in range(num_layers)],
        "expert_model_parallel_size": trainer.expert_model_parallel_size,
        "expert_tensor_parallel_size": trainer.expert_tensor_parallel_size,
        # Megatron trains no experts with tensor parallelism alone.
        "sequence_parallel": trainer.tensor_model_parallel_size > 1,
        "moe_router_score_function": experts.score,
        "moe_router_dtype": "fp32",
        # No loss balances the experts: the policy's loss alone decides.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }
    if experts.score == "softmax":
        # A softmax over the chosen logits alone is the softmax over all of them, divided by the chosen ones' sum.
        return fields | {"moe_router_pre_softmax": not experts.renormalises}
    fields |= {
        "moe_router_topk_scaling_factor": experts.scaling,
        "moe_router_enable_expert_bias": experts.has_correction,
        # Moved by each step, as in pretraining, the bias would choose other experts than the engines do.
        "moe_router_bias_update_rate": 0.0,
        "moe_router_pre_softmax": True,
    }
    if experts.num_groups_per_token < experts.num_groups:
        fields |= {
            "moe_router_num_groups": experts.num_groups,
            "moe_router_group_topk": experts.num_groups_per_token,
        }
    return fields


def _latent(latent: LatentAttention) -> dict[str, Any]:
    """Return the widths; angles and the factor of the scores are ours, so that Megatron is told of no scaling."""
    return {
        "multi_latent_attention": True,
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.latent_rank,
        "qk_head_dim": latent.nope_dim,
        "qk_pos_emb_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        "rope_type": "rope",
        "rotary_scaling_factor": 1.0,
    }
