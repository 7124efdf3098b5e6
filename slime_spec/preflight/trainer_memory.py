"""One trainer rank's memory: what it keeps from step to step, and what a step adds at its peak.

Ranks of a stage split a layer over tensor parallel ranks, its experts over EP x ETP; each has norms and routers whole.
The stages differ: the first has the embedding and the most microbatches in flight, the last the head, logits and a
draft in training. Not counted: what earlier stages keep of replies until the last one has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slime_spec.checkpoints.parameters import LayerParameters, Parameters
from slime_spec.config.pipeline_stages import stage_layers
from slime_spec.config.tree import Config, TrainerConfig
from slime_spec.preflight.activation_memory import ITEMSIZES, microbatch_bytes_per_token, row_ranks
from slime_spec.preflight.draft_memory import ADAM_STATES, FLOAT32_BYTES, DraftMemory

# Log-probabilities of logits: the logits, and in float32 the scaled, the shifted and the exponentiated ones.
FLOAT32_LOGITS = 3


@dataclass(frozen=True)
class TrainerMemory:
    """Holds the memory of one rank of a pipeline stage.

    ``num_parameters`` are the rank's, of which the optimizer has states for ``num_updated``. ``reference_bytes`` is the
    initial checkpoint, kept where the loss has a KL term. A microbatch of ``num_tokens`` packed tokens has
    ``activation_bytes`` and ``logits_bytes``; later in the step AdamW has a float32 copy of what it updates instead.
    With ``updates_on_host`` its ``moment_bytes`` are not on the GPU. Ranks of the last stage hold a draft in training.
    """

    stage: int
    num_stages: int
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
    def peak_bytes(self) -> int:
        """Return the most that the rank has at once, in a step."""
        replies, update = (0, 0) if self.draft is None else (self.draft.replies_bytes, self.draft.update_bytes)
        step = max(self.activation_bytes + self.logits_bytes, update)
        return self.kept_bytes + max(self.update_bytes, replies + step)

    @property
    def host_bytes(self) -> int:
        """Return what the host keeps of a rank that leaves its GPU; gradients are not kept."""
        moments = self.moment_bytes if self.updates_on_host else 0
        draft_bytes = 0 if self.draft is None else self.draft.host_bytes
        return self.weights_bytes + self.optimizer_bytes + moments + self.reference_bytes + draft_bytes


def trainer_memory(
    config: Config, target: Mapping[str, Any], counted: Parameters, draft: DraftMemory | None = None
) -> tuple[TrainerMemory, ...]:
    """Return the memory of a rank of each stage, for the target whose config.json is ``target``.

    ``draft`` is what a rank of the last stage holds of a draft in training. Raises ConfigError where layers cannot be
    split over stages as asked.
    """
    stages = stage_layers(len(counted.layers), config.trainer)
    return tuple(
        _of_stage(config, target, counted, number, layers, draft if number == len(stages) - 1 else None)
        for number, layers in enumerate(stages)
    )


def _of_stage(
    config: Config,
    target: Mapping[str, Any],
    counted: Parameters,
    stage: int,
    layers: range,
    draft: DraftMemory | None,
) -> TrainerMemory:
    trainer, num_stages = config.trainer, config.trainer.pipeline_model_parallel_size
    held = parameters_of_a_rank(trainer, target, counted, stage)
    num_parameters = held.split + held.whole + held.experts
    num_updated = num_parameters
    if trainer.use_distributed_optimizer:
        # It splits what it updates over the ranks that hold the same parameters.
        per_stage = trainer.world_size // num_stages
        copies, of_experts = per_stage // trainer.tensor_model_parallel_size, per_stage // _expert_ranks(trainer)
        num_updated = -(-(held.split + held.whole) // copies) - (-held.experts // of_experts)
    itemsize = ITEMSIZES[trainer.dtype]
    moments = ADAM_STATES * FLOAT32_BYTES
    masters = FLOAT32_BYTES if trainer.dtype != "float32" else 0
    weights_bytes = num_parameters * itemsize + held.corrections * FLOAT32_BYTES
    # A sample that is longer than a microbatch has one of its own; its last token is not fed.
    num_tokens = max(trainer.max_tokens_per_microbatch, config.rollout.longest - 1)
    is_last = stage == num_stages - 1
    return TrainerMemory(
        stage=stage,
        num_stages=num_stages,
        num_parameters=num_parameters,
        num_updated=num_updated,
        updates_on_host=trainer.optimizer_cpu_offload,
        itemsize=itemsize,
        num_tokens=num_tokens,
        recomputes=trainer.recompute,
        weights_bytes=weights_bytes,
        gradient_bytes=num_parameters * FLOAT32_BYTES,
        optimizer_bytes=num_updated * (masters if trainer.optimizer_cpu_offload else moments + masters),
        moment_bytes=num_updated * moments,
        reference_bytes=weights_bytes if config.algorithm.needs_reference else 0,
        # A stage has as many microbatches in flight as there are stages from it on.
        activation_bytes=num_tokens
        * (
            microbatch_bytes_per_token(trainer, target, layers, num_stages - stage)
            + (_last_bytes_per_token(trainer, target) if is_last else 0)
        ),
        logits_bytes=_logits_bytes(trainer, target, num_tokens) if is_last else 0,
        draft=draft,
    )


def parameters_of_a_rank(
    trainer: TrainerConfig, target: Mapping[str, Any], counted: Parameters, stage: int
) -> LayerParameters:
    """Return the parameters of a rank of the stage: the first has the embedding, the last the final norm and the head.

    The last of several stages has a copy of a tied embedding in the head's place.
    """
    layers = stage_layers(len(counted.layers), trainer)
    held = sum((counted.layers[layer] for layer in layers[stage]), LayerParameters(0, 0))
    table = target["vocab_size"] * target["hidden_size"]
    is_first, is_last = stage == 0, stage == len(layers) - 1
    tables = counted.tables if is_first and is_last else table * (is_first + is_last)
    return LayerParameters(
        split=(held.split + tables) // trainer.tensor_model_parallel_size,
        whole=held.whole + (target["hidden_size"] if is_last else 0),
        experts=held.experts // _expert_ranks(trainer),
        corrections=held.corrections,
    )


def _expert_ranks(trainer: TrainerConfig) -> int:
    """Return over how many ranks of a stage a layer's experts are spread and sliced."""
    per_expert = trainer.expert_tensor_parallel_size or trainer.tensor_model_parallel_size
    return trainer.expert_model_parallel_size * per_expert


def _last_bytes_per_token(trainer: TrainerConfig, target: Mapping[str, Any]) -> int:
    """Return what the last norm saves, and the rows of the head."""
    hidden, itemsize = target["hidden_size"], ITEMSIZES[trainer.dtype]
    norm = (2 * FLOAT32_BYTES + itemsize) * hidden // row_ranks(trainer, target)
    return int(norm + itemsize * hidden)


def _logits_bytes(trainer: TrainerConfig, target: Mapping[str, Any], num_tokens: int) -> int:
    of_each = ITEMSIZES[trainer.dtype] + FLOAT32_LOGITS * FLOAT32_BYTES
    return int(num_tokens * target["vocab_size"] // trainer.tensor_model_parallel_size * of_each)
