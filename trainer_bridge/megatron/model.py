"""PolicyModel is the policy as a Megatron-Core GPTModel over packed segments."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.rope import inverse_frequencies
from slime_spec.config.tree import TrainerConfig
from trainer_bridge.megatron import names
from trainer_bridge.megatron.attention import PackedSegments, SegmentAttention


def transformer_config(spec: ModelSpec, trainer: TrainerConfig) -> TransformerConfig:
    """Return Megatron's description of the model and of how its ranks share it."""
    dtype = getattr(torch, trainer.dtype)
    recompute: dict[str, Any] = {}
    if trainer.recompute:
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.intermediate_size,
        num_attention_heads=spec.num_heads,
        num_query_groups=spec.num_kv_heads,
        kv_channels=spec.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=spec.rms_norm_eps,
        qk_layernorm=spec.qk_norm,
        add_qkv_bias=spec.qkv_bias,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=trainer.tensor_model_parallel_size,
        pipeline_model_parallel_size=trainer.pipeline_model_parallel_size,
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
        **recompute,
    )


def _fill_with_nan(weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.init.constant_(weight, math.nan)


class PolicyModel(GPTModel):
    """Extends GPTModel: positions come with the tokens, and the last stage computes logits for the asked rows only.

    Called as ``model(token_ids, position_ids, None, packed_seq_params=PackedSegments(...))``; returns float or bfloat16
    logits [N, vocab / tensor ranks] on the last pipeline stage, hidden states [T, 1, hidden] on the others.
    """

    def __init__(self, spec: ModelSpec, config: TransformerConfig) -> None:
        layer_spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=spec.qk_norm)
        layer_spec.submodules.self_attention.submodules.core_attention = SegmentAttention
        super().__init__(
            config=config,
            transformer_layer_spec=layer_spec,
            vocab_size=spec.vocab_size,
            max_sequence_length=spec.max_position_embeddings,
            pre_process=mpu.is_pipeline_first_stage(),
            post_process=mpu.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=spec.tie_word_embeddings,
            # RoPE is applied from explicit positions, which restart where responses share a prompt: see _preprocess.
            position_embedding_type="none",
        )
        # Megatron's own scaling fixes three of llama3's four parameters: it cannot represent every checkpoint.
        self.inv_freq = inverse_frequencies(spec)

    def _preprocess(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        decoder_input: torch.Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: Any = None,
        padding_mask: torch.Tensor | None = None,
    ) -> tuple[Any, ...]:
        """Return Megatron's (hidden states or None, rotary angles, cos, sin, length offset, padding mask)."""
        hidden = self.embedding(input_ids=input_ids, position_ids=position_ids) if self.pre_process else None
        angles = torch.outer(position_ids[0].float(), self.inv_freq.to(position_ids.device))
        return hidden, torch.cat([angles, angles], dim=-1)[:, None, None, :], None, None, None, None

    def _postprocess(
        self, hidden_states: torch.Tensor, *args: Any, packed_seq_params: PackedSegments, **kwargs: Any
    ) -> torch.Tensor:
        if not self.post_process:
            return hidden_states
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden_states.index_select(0, packed_seq_params.rows), weight=weight)
        return logits[:, 0]


def build_model(spec: ModelSpec, config: TransformerConfig) -> PolicyModel:
    """Return this rank's part of the policy, on its device, with NaN weights."""
    model = PolicyModel(spec, config)
    if config.bf16:
        model.bfloat16()
    return model.to(policy_device())


def policy_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@torch.no_grad()
def load_weights(model: PolicyModel, tensors: Mapping[str, torch.Tensor], spec: ModelSpec) -> None:
    """Fill this rank's part from Hugging Face tensors, casting to the parameters' dtype."""
    for param, exact in exact_values(model, tensors, spec):
        param.copy_(exact)


def exact_values(
    model: PolicyModel, tensors: Mapping[str, torch.Tensor], spec: ModelSpec
) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Yield each parameter of this rank's part and its values of Hugging Face tensors, in their dtype."""
    rank, num_ranks = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
    for name, param in _named(model):
        yield param, names.shard(name, names.from_hf(name, tensors, spec), rank, num_ranks)


def hf_tensors(model: PolicyModel, spec: ModelSpec) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield this stage's weights as whole, contiguous Hugging Face tensors; a collective over its tensor ranks.

    The copy of a tied embedding on the last stage of several is left out: the first stage holds it.
    """
    for name, param in _named(model):
        if name == "output_layer.weight" and spec.tie_word_embeddings:
            continue
        for hf_name, tensor in names.to_hf(name, names.unshard(name, _gathered(name, param.detach())), spec):
            yield hf_name, tensor.contiguous()


def _named(model: PolicyModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    offset = get_transformer_layer_offset(model.config)
    for name, param in model.named_parameters():
        yield names.global_name(name, offset), param


def _gathered(name: str, param: torch.Tensor) -> list[torch.Tensor]:
    num_ranks = mpu.get_tensor_model_parallel_world_size()
    if num_ranks == 1 or not names.is_sharded(name):
        return [param]
    shards = [torch.empty_like(param) for _ in range(num_ranks)]
    dist.all_gather(shards, param.contiguous(), group=mpu.get_tensor_model_parallel_group())
    return shards
