"""The Ray actor around one rollout engine: no policy in it, only the engine's methods made remote."""

from __future__ import annotations

from collections.abc import Iterator

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from slime_spec.config.tree import Config
from slime_spec.interfaces import ENGINES, TRANSPORTS, Generation, RolloutEngine, load_choice
from slime_spec.placement import Placement
from slime_spec.types import EngineStats, GeneratedSample, GroupRequest
from slime_spec.weights.push import PushMessage, PushReply

# Every group being generated holds one thread, which sleeps until the engine's own loop finishes a sample.
MAX_GROUPS_IN_FLIGHT = 512


class EngineWorker:
    """One engine in its own process; groups generate concurrently, control calls never wait behind them."""

    _engine: RolloutEngine

    def __init__(self, config: Config, engine_index: int) -> None:
        self._config, self._index = config, engine_index
        self._generations: dict[str, Generation] = {}

    @ray.method(concurrency_group="control")
    def start(self) -> EngineStats:
        # Built here: what an actor's constructor raises reaches the caller only as Ray's "the actor died".
        transport = load_choice("push.transport", TRANSPORTS, self._config.push.transport)()
        engine_class = load_choice("rollout.engine", ENGINES, self._config.rollout.engine)
        self._engine = engine_class(self._config, self._index, transport)
        self._engine.start()
        return self._engine.stats()

    @ray.method(concurrency_group="generate", num_returns="streaming")
    def generate(self, request: GroupRequest) -> Iterator[GeneratedSample]:
        generation = self._engine.generate(request)
        self._generations[request.group_id] = generation
        try:
            yield from generation
        finally:
            self._generations.pop(request.group_id, None)

    @ray.method(concurrency_group="control")
    def abort(self) -> None:
        for generation in list(self._generations.values()):
            generation.abort()

    @ray.method(concurrency_group="control")
    def update_weights(self, message: PushMessage) -> PushReply:
        return self._engine.update_weights(message)

    @ray.method(concurrency_group="control")
    def set_resident(self, resident: bool) -> EngineStats:
        self._engine.set_resident(resident)
        return self._engine.stats()

    @ray.method(concurrency_group="control")
    def stats(self) -> EngineStats:
        return self._engine.stats()

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        if hasattr(self, "_engine"):  # not where ``start`` was refused
            self._engine.stop()


def create_engine_actor(config: Config, engine_index: int, placement: Placement) -> ray.actor.ActorHandle:
    """Start one engine's actor in its bundle, with as many compute threads as the cores it was given."""
    threads = str(config.rollout.num_cpus_per_engine)
    actor_class = ray.remote(concurrency_groups={"generate": MAX_GROUPS_IN_FLIGHT, "control": 1})(EngineWorker)
    return actor_class.options(
        name=None,
        num_cpus=placement.num_cpus_of_rank(engine_index),
        num_gpus=placement.num_gpus_of_rank(engine_index),
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            placement_group=placement.placement_group,
            placement_group_bundle_index=placement.bundle_of_rank(engine_index),
        ),
        # Two processes that spin at OpenMP barriers on the same cores make each other many times slower.
        runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}},
    ).remote(config, engine_index)
