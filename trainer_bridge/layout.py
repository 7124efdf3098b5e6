"""A Layout says how ranks form tensor, pipeline and data parallel groups, with sizes that fit the model."""

from __future__ import annotations

from dataclasses import dataclass

from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.checks import check_ranks
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError


@dataclass(frozen=True)
class RankCoordinates:
    """Holds a rank's place in each kind of group."""

    tensor: int
    data: int
    pipeline: int


@dataclass(frozen=True)
class Layout:
    """Holds group sizes; ranks count tensor first, then data, then pipeline (Megatron's order tp-cp-ep-dp-pp)."""

    tensor: int
    pipeline: int
    data: int

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
        """Return the ranks whose shards together are one pipeline stage's weights, tensor rank 0 first."""
        first = stage * self.tensor * self.data
        return tuple(range(first, first + self.tensor))


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
    if spec.num_layers % pipeline:
        raise ConfigError(
            "trainer.pipeline_model_parallel_size",
            f"must divide the model's layers ({spec.num_layers})",
            pipeline,
            "Choose another --pipeline-model-parallel-size.",
        )
    return Layout(tensor, pipeline, trainer.world_size // (tensor * pipeline))


def _split_by_tensor_ranks(spec: ModelSpec) -> dict[str, int]:
    return {
        "attention heads": spec.num_heads,
        "key-value heads": spec.num_kv_heads,
        "feed-forward size": spec.intermediate_size,
        "vocabulary": spec.vocab_size,
    }
