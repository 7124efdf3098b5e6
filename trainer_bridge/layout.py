"""A Layout says how ranks form tensor, pipeline and data parallel groups, with sizes that fit the model."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

from slime_spec.checkpoints.block_parts import Experts
from slime_spec.checkpoints.folder import TARGET_PATH
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.checks import check_ranks
from slime_spec.config.pipeline_stages import stage_layers
from slime_spec.config.tree import Config, TrainerConfig
from slime_spec.errors import ConfigError

ONLY_ROLLOUTS = "Pass --debug-rollout-only: rollouts with speculation do not need the trainer."


@dataclass(frozen=True)
class RankCoordinates:
    """Holds a rank's place in each kind of group."""

    tensor: int
    data: int
    pipeline: int


@dataclass(frozen=True)
class Layout:
    """Holds group sizes; ranks count tensor first, then data, then pipeline (Megatron's order tp-cp-ep-dp-pp).

    The ranks of a stage share its experts another way: ``expert_tensor`` ranks (None: ``tensor``) have slices of the
    same ones, ``expert`` such groups all of them, and there are as many copies as that leaves.
    """

    tensor: int
    pipeline: int
    data: int
    expert: int = 1
    expert_tensor: int | None = None

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    def coordinates(self, rank: int) -> RankCoordinates:
        return RankCoordinates(
            tensor=rank % self.tensor,
            data=rank // self.tensor % self.data,
            pipeline=rank // (self.tensor * self.data),
        )

    def ranks(self, stage: int) -> tuple[int, ...]:
        """Return the ranks of one pipeline stage, its holders first."""
        per_stage = self.tensor * self.data
        return tuple(range(stage * per_stage, (stage + 1) * per_stage))

    def holders(self, stage: int) -> tuple[int, ...]:
        """Return the ranks whose shards together are one pipeline stage's weights, tensor rank 0 first.

        They are whole groups of every kind, so that what one of them gathers, all of them can gather together.
        """
        first = stage * self.tensor * self.data
        return tuple(range(first, first + lcm(self.tensor, self.expert * (self.expert_tensor or self.tensor))))


def check_layout(config: Config, spec: ModelSpec) -> Layout:
    """Return the layout that the trainer settings ask for.

    Raises ConfigError where model and sizes do not fit each other.
    """
    trainer = config.trainer
    tensor, pipeline = trainer.tensor_model_parallel_size, trainer.pipeline_model_parallel_size
    check_ranks(trainer)
    for what, size in _split_by_tensor_ranks(spec).items():
        if size % tensor:
            raise ConfigError(
                "trainer.tensor_model_parallel_size",
                f"must divide the model's {what} ({size})",
                tensor,
                "Choose a smaller --tensor-model-parallel-size.",
            )
    stage_layers(spec.num_layers, trainer)  # called only for its errors
    data = trainer.world_size // (tensor * pipeline)
    if spec.experts is None:
        _check_without_experts(trainer)
        return Layout(tensor, pipeline, data)
    _check_experts(trainer, spec.experts)
    _check_router(spec.experts)
    return Layout(tensor, pipeline, data, trainer.expert_model_parallel_size, trainer.expert_tensor_parallel_size)


def _split_by_tensor_ranks(spec: ModelSpec) -> dict[str, int]:
    sizes = {
        "attention heads": spec.num_heads,
        "key-value heads": spec.num_kv_heads,
        "feed-forward size": spec.intermediate_size,
        "vocabulary": spec.vocab_size,
    }
    if spec.latent is not None:
        sizes["latent of keys and values"] = spec.latent.latent_rank + spec.latent.rope_dim
        sizes["latent of queries"] = spec.latent.query_rank or 0
    if spec.experts is not None:
        sizes["shared experts' size"] = spec.experts.num_shared * spec.experts.width
    return sizes


def _check_without_experts(trainer: TrainerConfig) -> None:
    if trainer.expert_model_parallel_size > 1:
        raise ConfigError(
            "trainer.expert_model_parallel_size",
            "must be 1 for a model without experts",
            trainer.expert_model_parallel_size,
            "Leave --expert-model-parallel-size out.",
        )


def _check_experts(trainer: TrainerConfig, experts: Experts) -> None:
    expert_ranks = trainer.expert_model_parallel_size
    if experts.num_experts % expert_ranks:
        raise ConfigError(
            "trainer.expert_model_parallel_size",
            f"must divide the model's experts ({experts.num_experts})",
            expert_ranks,
            "Choose another --expert-model-parallel-size.",
        )
    all_tensor = trainer.tensor_model_parallel_size
    tensor = trainer.expert_tensor_parallel_size or all_tensor
    if expert_ranks == 1 and tensor < all_tensor:
        raise ConfigError(
            "trainer.expert_tensor_parallel_size",
            f"must be tensor_model_parallel_size ({all_tensor}) where expert_model_parallel_size is 1: tensor ranks "
            "give an expert different tokens, and Megatron would not add up what each has learned",
            tensor,
            f"Leave --expert-tensor-parallel-size out, or pass --expert-model-parallel-size {all_tensor}.",
        )
    if experts.width % tensor:
        raise ConfigError(
            "trainer.expert_tensor_parallel_size",
            f"must divide the experts' feed-forward size ({experts.width})",
            tensor,
            "Pass --expert-tensor-parallel-size 1 with an --expert-model-parallel-size of more than 1.",
        )


def _check_router(experts: Experts) -> None:
    """Raise ConfigError for a router of which Megatron computes another one than the engines."""
    chosen, groups = experts.num_per_token, experts.num_groups_per_token
    if groups < experts.num_groups and chosen // groups != 2:
        raise ConfigError(
            f"{TARGET_PATH}: topk_group",
            f"must be half of num_experts_per_tok ({chosen}): Megatron ranks a group by as many experts as it gives a "
            "token, the engines by two",
            groups,
            ONLY_ROLLOUTS,
        )
    if experts.score == "sigmoid" and not experts.renormalises:
        raise ConfigError(
            f"{TARGET_PATH}: norm_topk_prob",
            "must be true: Megatron divides the weights that a sigmoid gives by their sum always",
            False,
            ONLY_ROLLOUTS,
        )
    if chosen == 1 and experts.renormalises:
        raise ConfigError(
            f"{TARGET_PATH}: num_experts_per_tok",
            "must be more than 1 with norm_topk_prob: Megatron leaves a single expert's weight as it is",
            chosen,
            ONLY_ROLLOUTS,
        )
