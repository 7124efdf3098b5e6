"""PolicyModel is the policy as a Megatron-Core GPTModel over packed segments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.rope import inverse_frequencies
from trainer_bridge.megatron import names
from trainer_bridge.megatron.attention import PackedSegments
from trainer_bridge.megatron.layers import stage_layers


class PolicyModel(GPTModel):
    """Extends GPTModel: positions come with the tokens, and the last stage computes logits for the asked rows only.

    Called as ``model(token_ids, position_ids, None, packed_seq_params=PackedSegments(...))``; returns float or bfloat16
    logits [N, vocab / tensor ranks] on the last pipeline stage, hidden states [T, 1, hidden] on the others.
    """

    def __init__(self, spec: ModelSpec, config: TransformerConfig) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=stage_layers(spec, config),
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
        if self.post_process and config.sequence_parallel:
            # The head is given rows that were picked from all ranks' rows, not its own rank's.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = True

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
        logits, _ = self.output_layer(
            all_rows(hidden_states, self).index_select(0, packed_seq_params.rows), weight=weight
        )
        return logits[:, 0]


def all_rows(states: torch.Tensor, model: PolicyModel) -> torch.Tensor:
    """Return the states [T, 1, width] of all rows, of which a sequence-parallel rank has its own; then a collective.

    The gradient of the result must be the same on every tensor rank, each of which keeps its own rows' part.
    """
    if not model.config.sequence_parallel:
        return states
    gathered: torch.Tensor = gather_from_sequence_parallel_region(states, tensor_parallel_output_grad=False)
    return gathered


def build_model(spec: ModelSpec, config: TransformerConfig) -> PolicyModel:
    """Return this rank's part of the policy, on its device, with NaN weights."""
    model = PolicyModel(spec, config)
    if config.bf16:
        model.bfloat16()
        for router in _routers_with_bias(model):
            # Rounded, a bias would choose other experts.
            router.expert_bias = router.expert_bias.float()
    for router in _routers_with_bias(model):
        router.expert_bias.fill_(torch.nan)
    return model.to(policy_device())


def _routers_with_bias(model: PolicyModel) -> Iterator[TopKRouter]:
    routers = (module for module in model.modules() if isinstance(module, TopKRouter))
    return (router for router in routers if router.expert_bias is not None)


def policy_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@torch.no_grad()
def load_weights(model: PolicyModel, tensors: Mapping[str, torch.Tensor], spec: ModelSpec) -> None:
    """Fill this rank's part from Hugging Face tensors, casting to the weights' dtypes."""
    for weight, exact in exact_values(model, tensors, spec):
        weight.copy_(exact)


def exact_values(
    model: PolicyModel, tensors: Mapping[str, torch.Tensor], spec: ModelSpec
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield each weight of this rank's part and its values of Hugging Face tensors, in their dtype."""
    for name, weight in named_weights(model):
        group = _sharing_group(name)
        yield weight, names.shard(name, names.from_hf(name, tensors, spec), group.rank(), group.size())


def hf_names(model: PolicyModel, spec: ModelSpec) -> frozenset[str]:
    """Return the Hugging Face tensors that this rank's part is made of."""
    return frozenset(hf_name for name, _ in named_weights(model) for hf_name in names.hf_names(name, spec))


def hf_tensors(model: PolicyModel, spec: ModelSpec) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield this stage's weights as whole, contiguous Hugging Face tensors.

    A collective over the stage's tensor ranks, with experts over its expert parallel ranks, too. The copy of a tied
    embedding on the last stage of several is left out: the first stage holds it.
    """
    for name, weight in named_weights(model):
        if name == "output_layer.weight" and spec.tie_word_embeddings:
            continue
        part = weight.detach()
        shards = _gathered(part, _sharing_group(name)) if names.is_sharded(name) else [part]
        for whole_name, whole in _of_all_experts(name, names.unshard(name, shards), spec):
            for hf_name, tensor in names.to_hf(whole_name, whole, spec):
                yield hf_name, tensor.contiguous()


def named_weights(model: PolicyModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield this rank's part of the checkpoint's tensors by global names: parameters, and the routers' biases.

    The biases are buffers, as no gradient reaches them; they choose experts, and belong to the weights all the same.
    """
    layers = get_transformer_layer_offset(model.config)
    experts = 0
    if model.config.num_moe_experts is not None:
        experts = model.config.num_moe_experts // mpu.get_expert_model_parallel_world_size()
    biases = ((name, bias) for name, bias in model.named_buffers() if name.endswith(names.ROUTER_BIAS))
    for name, weight in chain(model.named_parameters(), biases):
        yield names.global_name(name, layers, experts * mpu.get_expert_model_parallel_rank()), weight


def _of_all_experts(name: str, whole: torch.Tensor, spec: ModelSpec) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weight, of an expert those of all expert parallel ranks: each has others of the experts."""
    if spec.experts is None or not names.is_expert(name):
        yield name, whole
        return
    group = mpu.get_expert_model_parallel_group()
    per_rank = spec.experts.num_experts // group.size()
    for rank, of_rank in enumerate(_gathered(whole, group)):
        yield names.of_peer(name, (rank - group.rank()) * per_rank), of_rank


def _sharing_group(name: str) -> dist.ProcessGroup:
    """Return the ranks that hold a sharded weight's slices."""
    of_experts = names.is_expert(name)
    return mpu.get_expert_tensor_parallel_group() if of_experts else mpu.get_tensor_model_parallel_group()


def _gathered(part: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    if group.size() == 1:
        return [part]
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts
