"""Where actors run: one placement group for the whole job, and each actor's bundle in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slime_spec.config.tree import Config


@dataclass(frozen=True)
class Bundle:
    """One bundle of the placement group: cores and GPUs reserved together on one node."""

    num_cpus: float
    num_gpus: float


@dataclass(frozen=True)
class Placement:
    """The bundles of one kind of actor; ``rank`` counts engines, or trainer ranks."""

    placement_group: Any
    bundles: tuple[int, ...]
    num_cpus: float
    num_gpus: float

    def bundle_of_rank(self, rank: int) -> int:
        return self.bundles[rank]

    def num_cpus_of_rank(self, rank: int) -> float:
        return self.num_cpus

    def num_gpus_of_rank(self, rank: int) -> float:
        return self.num_gpus


@dataclass(frozen=True)
class BundlePlan:
    """What to reserve, before any Ray exists; each actor kind gets a share of each of its bundles."""

    bundles: tuple[Bundle, ...]
    engine_bundles: tuple[int, ...]
    rank_bundles: tuple[int, ...]
    engine_share: float
    rank_share: float

    @property
    def num_cpus(self) -> float:
        return sum(bundle.num_cpus for bundle in self.bundles)


def plan_bundles(config: Config) -> BundlePlan:
    """Lay out engines and trainer ranks; colocated ones share bundles (half each, since they take turns).

    With ``rollout_only`` there are no ranks, with ``train_only`` no engines.
    """
    num_engines = 0 if config.run.mode == "train_only" else config.rollout.num_engines
    num_ranks = 0 if config.run.mode == "rollout_only" else config.trainer.world_size
    engine = Bundle(config.rollout.num_cpus_per_engine, config.rollout.num_gpus_per_engine)
    rank = Bundle(config.trainer.num_cpus_per_rank, 1.0 if config.trainer.num_gpus else 0.0)
    if not (config.cluster.colocate and num_engines and num_ranks):
        bundles = (engine,) * num_engines + (rank,) * num_ranks
        return BundlePlan(
            bundles, tuple(range(num_engines)), tuple(range(num_engines, num_engines + num_ranks)), 1.0, 1.0
        )
    shared = Bundle(max(engine.num_cpus, rank.num_cpus), max(engine.num_gpus, rank.num_gpus))
    count = max(num_engines, num_ranks)
    return BundlePlan((shared,) * count, tuple(range(num_engines)), tuple(range(num_ranks)), 0.5, 0.5)
