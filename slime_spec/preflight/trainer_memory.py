"""One trainer rank's memory: what it keeps from step to step, and what a step adds at its peak.

Activations are those that PyTorch saves for the backward pass of the layers that the trainer builds, with RMSNorm
written out in float32 (a fused kernel saves less). A tensor-parallel rank has whole hidden states and its share of the
rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slime_spec.checkpoints.families import family_of
from slime_spec.checkpoints.folder import architecture_of
from slime_spec.checkpoints.parameters import Parameters, head_dim, num_kv_heads
from slime_spec.config.tree import Config, TrainerConfig
from slime_spec.preflight.draft_memory import ADAM_STATES, FLOAT32_BYTES, DraftMemory

ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
# Log-probabilities of logits: the logits, and in float32 the scaled, the shifted and the exponentiated ones.
FLOAT32_LOGITS = 3


@dataclass(frozen=True)
class TrainerMemory:
    """Holds one rank's memory, of the pipeline stage with the most parameters.

    ``num_parameters`` are the rank's, of which the optimizer has states for ``num_updated``. ``reference_bytes`` is the
    initial checkpoint, kept where the loss has a KL term. A microbatch of ``num_tokens`` packed tokens has
    ``activation_bytes`` and ``logits_bytes``; later in the step AdamW has a float32 copy of what it updates instead.
    With ``updates_on_host`` its ``moment_bytes`` are not on the GPU. One tensor rank of the last stage holds a draft in
    training whole.
    """

    num_parameters: int
    num_updated: int
    updates_on_host: bool
    itemsize: int
    num_tokens: int
    recomputes: bool
    weights_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    moment_bytes: int
    reference_bytes: int
    activation_bytes: int
    logits_bytes: int
    draft: DraftMemory | None = None

    @property
    def draft_bytes(self) -> int:
        """Return what a draft in training takes from step to step."""
        return 0 if self.draft is None else self.draft.state_bytes

    @property
    def kept_bytes(self) -> int:
        """Return what the rank keeps from step to step."""
        kept = self.weights_bytes + self.gradient_bytes + self.optimizer_bytes + self.reference_bytes
        return kept + self.draft_bytes

    @property
    def update_bytes(self) -> int:
        return 0 if self.updates_on_host else self.num_updated * FLOAT32_BYTES

    @property
    def host_bytes(self) -> int:
        """Return what the host keeps of a rank that leaves its GPU; gradients are not kept."""
        moments = self.moment_bytes if self.updates_on_host else 0
        draft_bytes = 0 if self.draft is None else self.draft.host_bytes
        return self.weights_bytes + self.optimizer_bytes + moments + self.reference_bytes + draft_bytes


def trainer_memory(
    config: Config, target: Mapping[str, Any], counted: Parameters, draft: DraftMemory | None = None
) -> TrainerMemory:
    """Return a rank's memory for the target whose config.json is ``target``, and a draft that it trains."""
    trainer = config.trainer
    shared, experts = _parameters_of_a_rank(trainer, target, counted)
    held = updated = shared + experts
    if trainer.use_distributed_optimizer:
        # It splits what it updates over the ranks that hold the same parameters.
        per_stage = trainer.world_size // trainer.pipeline_model_parallel_size
        copies, of_experts = per_stage // trainer.tensor_model_parallel_size, per_stage // _expert_ranks(trainer)
        updated = -(-shared // copies) - (-experts // of_experts)
    itemsize = ITEMSIZES[trainer.dtype]
    moments = ADAM_STATES * FLOAT32_BYTES
    masters = FLOAT32_BYTES if trainer.dtype != "float32" else 0
    # A sample that is longer than a microbatch has one of its own; its last token is not fed.
    num_tokens = max(trainer.max_tokens_per_microbatch, config.rollout.longest - 1)
    logit_bytes = itemsize + FLOAT32_LOGITS * FLOAT32_BYTES
    return TrainerMemory(
        num_parameters=held,
        num_updated=updated,
        updates_on_host=trainer.optimizer_cpu_offload,
        itemsize=itemsize,
        num_tokens=num_tokens,
        recomputes=trainer.recompute,
        weights_bytes=held * itemsize,
        gradient_bytes=held * FLOAT32_BYTES,
        optimizer_bytes=updated * (masters if trainer.optimizer_cpu_offload else moments + masters),
        moment_bytes=updated * moments,
        reference_bytes=held * itemsize if config.algorithm.kl_loss_coef > 0 else 0,
        activation_bytes=_activation_bytes(trainer, target, num_tokens),
        logits_bytes=num_tokens * target["vocab_size"] // trainer.tensor_model_parallel_size * logit_bytes,
        draft=draft,
    )


def _parameters_of_a_rank(trainer: TrainerConfig, target: Mapping[str, Any], counted: Parameters) -> tuple[int, int]:
    """Return the parameters of a rank of the first or the last stage, which hold embedding and head beside layers.

    The second number are those of experts, which ranks share another way.
    """
    stages = trainer.pipeline_model_parallel_size
    layers = (counted.decoder - counted.tables - counted.experts) // stages
    # The last of several stages has a copy of a tied embedding.
    tables = counted.tables if stages == 1 else target["vocab_size"] * target["hidden_size"]
    return (layers + tables) // trainer.tensor_model_parallel_size, counted.experts // stages // _expert_ranks(trainer)


def _expert_ranks(trainer: TrainerConfig) -> int:
    """Return over how many ranks of a stage a layer's experts are spread and sliced."""
    per_expert = trainer.expert_tensor_parallel_size or trainer.tensor_model_parallel_size
    return trainer.expert_model_parallel_size * per_expert


def _activation_bytes(trainer: TrainerConfig, target: Mapping[str, Any], num_tokens: int) -> int:
    """Return what the microbatches in flight keep for their backward passes.

    With recomputation a layer keeps its input; all that it saves, and the gradients of that, exist for one at a time.
    """
    hidden, itemsize = target["hidden_size"], ITEMSIZES[trainer.dtype]
    # The first of several stages has as many microbatches in flight as there are stages, each of its share of layers.
    num_layers = target["num_hidden_layers"]
    layer = layer_bytes_per_token(trainer, target)
    last = (2 * FLOAT32_BYTES + 2 * itemsize) * hidden  # the last norm and the rows of the head
    per_token = num_layers * hidden * itemsize + 2 * layer if trainer.recompute else num_layers * layer
    return num_tokens * (per_token + last)


def layer_bytes_per_token(trainer: TrainerConfig, target: Mapping[str, Any]) -> int:
    """Return what one layer saves for the backward pass, for each of a microbatch's tokens."""
    itemsize, ranks = ITEMSIZES[trainer.dtype], trainer.tensor_model_parallel_size
    heads, dim, hidden = target["num_attention_heads"], head_dim(target), target["hidden_size"]
    queries, keys = heads * dim // ranks, num_kv_heads(target) * dim // ranks
    norm = 2 * FLOAT32_BYTES + itemsize  # its input and the normalised in float32, its output; and a root a token
    norms = 2 * (norm * hidden + FLOAT32_BYTES)
    if family_of(architecture_of(target)).qk_norm:
        norms += norm * (queries + keys) + FLOAT32_BYTES * (queries + keys) // dim
    angles = 4 * dim * itemsize
    # Before and after the rotation, the output and the input of the projection; a logarithm a head.
    attention = (4 * queries + 3 * keys) * itemsize + FLOAT32_BYTES * heads // ranks
    attends_in = itemsize
    if trainer.num_gpus == 0 and trainer.dtype == "bfloat16":
        # A CPU attends in float32, to copies; the projection has the output rounded.
        attends_in = FLOAT32_BYTES
        attention = 2 * (queries + keys) * attends_in + queries * itemsize + FLOAT32_BYTES * heads // ranks
    # Responses that share a prompt have copies of its keys and values, and their outputs are joined.
    shared = (queries + 4 * keys) * attends_in
    mlp = 5 * target["intermediate_size"] // ranks * itemsize  # gate, up, the gate twice more, the product
    return norms + angles + attention + shared + mlp
