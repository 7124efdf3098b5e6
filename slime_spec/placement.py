"""The placement says where actors run: one placement group for the whole job, with each actor's bundle.

An engine has an actor on each of its nodes. The bundles that engines and trainer ranks have:

    apart                     one for each (engine, node) with all its GPUs there, one for each rank
    colocated, up to 1 GPU    one for an engine and a rank, half each
    colocated, several GPUs   one for each GPU, half a rank's (Ray cannot halve eight GPUs, only each of them);
                              the engine's actor has half of the first and gets the names of the others
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slime_spec.config.tree import Config
from slime_spec.engines import kind_of


@dataclass(frozen=True)
class Bundle:
    """A Bundle of the placement group reserves cores and GPUs together on one node."""

    num_cpus: float
    num_gpus: float


@dataclass(frozen=True)
class Placement:
    """Names the bundles of one kind of actor; ``rank`` counts engines, or trainer ranks.

    ``nodes`` are the bundles of each engine's actors, one a node, its entry in ``bundles`` first. ``devices`` are
    the GPUs of an engine's actor where Ray gives it fewer, by its bundle.
    """

    placement_group: Any
    bundles: tuple[int, ...]
    num_cpus: float
    num_gpus: float
    nodes: tuple[tuple[int, ...], ...] = ()
    devices: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def bundle_of_rank(self, rank: int) -> int:
        return self.bundles[rank]

    def num_cpus_of_rank(self, rank: int) -> float:
        return self.num_cpus

    def num_gpus_of_rank(self, rank: int) -> float:
        return self.num_gpus

    def other_nodes_of_rank(self, rank: int) -> tuple[int, ...]:
        """Return the bundles of an engine's actors on the nodes after its first."""
        return self.nodes[rank][1:] if self.nodes else ()

    def devices_of_bundle(self, bundle: int) -> tuple[str, ...]:
        """Return the GPUs that an engine's actor may use, as CUDA_VISIBLE_DEVICES names them.

        The tuple is empty where Ray itself has given the actor all of them.
        """
        return self.devices.get(bundle, ())


@dataclass(frozen=True)
class BundlePlan:
    """Says what to reserve, before Ray starts; each actor kind gets a share of each of its bundles.

    ``engine_nodes`` are the bundles of each engine's actors, one a node. Of the bundles, each ``together`` in a row
    must be on one node.
    """

    bundles: tuple[Bundle, ...]
    engine_nodes: tuple[tuple[int, ...], ...]
    rank_bundles: tuple[int, ...]
    engine_share: float
    rank_share: float
    together: int = 1

    @property
    def engine_bundles(self) -> tuple[int, ...]:
        """Return the bundle of each engine on the engine's first node."""
        return tuple(nodes[0] for nodes in self.engine_nodes)

    @property
    def num_cpus(self) -> float:
        return sum(bundle.num_cpus for bundle in self.bundles)

    @property
    def num_gpus(self) -> float:
        return sum(bundle.num_gpus for bundle in self.bundles)


def num_engine_nodes(config: Config) -> int:
    """Return how many nodes each engine is on; slime_spec.config.checks has seen that its GPUs fill them evenly."""
    return max(1, -(-num_reserved_gpus(config) // config.cluster.num_gpus_per_node))


def num_reserved_gpus(config: Config) -> int:
    """Return how many GPUs Ray must keep for one engine: none for an external server."""
    return 0 if kind_of(config).uses_external_servers(config) else config.rollout.num_gpus_per_engine


def plan_bundles(config: Config) -> BundlePlan:
    """Lay out engines and trainer ranks; with ``rollout_only`` there are no ranks, with ``train_only`` no engines."""
    num_engines = 0 if config.run.mode == "train_only" else config.rollout.num_engines
    num_ranks = 0 if config.run.mode == "rollout_only" else config.trainer.world_size
    num_nodes = num_engine_nodes(config)
    num_gpus = num_reserved_gpus(config) // num_nodes
    engine = Bundle(config.rollout.num_cpus_per_engine, num_gpus)
    rank = Bundle(config.trainer.num_cpus_per_rank, 1.0 if config.trainer.num_gpus else 0.0)
    if not (config.cluster.colocate and num_engines and num_ranks):
        first_rank = num_engines * num_nodes
        return BundlePlan(
            (engine,) * first_rank + (rank,) * num_ranks,
            _in_rows(range(first_rank), num_nodes),
            tuple(range(first_rank, first_rank + num_ranks)),
            1.0,
            1.0,
        )
    if num_gpus <= 1:
        shared = Bundle(max(engine.num_cpus, rank.num_cpus), max(engine.num_gpus, rank.num_gpus))
        count = max(num_engines * num_nodes, num_ranks)
        engine_nodes = _in_rows(range(num_engines * num_nodes), num_nodes)
        return BundlePlan((shared,) * count, engine_nodes, tuple(range(num_ranks)), 0.5, 0.5)
    one_gpu = Bundle(max(engine.num_cpus, rank.num_cpus), 1.0)
    count = num_engines * num_nodes * num_gpus
    engine_nodes = _in_rows(range(0, count, num_gpus), num_nodes)
    return BundlePlan((one_gpu,) * count, engine_nodes, tuple(range(num_ranks)), 0.5, 0.5, together=num_gpus)


def _in_rows(numbers: range, length: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(numbers[start : start + length]) for start in range(0, len(numbers), length))
