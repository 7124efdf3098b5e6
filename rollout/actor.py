"""Ray actors make a rollout engine's methods callable from other processes, and decide nothing themselves."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rollout.node_actor import NodeWorker, RayNode
from slime_spec.config.tree import Config
from slime_spec.engines import kind_of
from slime_spec.interfaces import Generation, MayServeLater, MayStopServing, RolloutEngine, load
from slime_spec.placement import Placement
from slime_spec.site import Site
from slime_spec.transports.choice import make_transport
from slime_spec.types import EarlierReply, EngineStats, GeneratedSample, GroupRequest
from slime_spec.weights.messages import PushMessage, PushReply

# Every in-flight group holds one thread, which sleeps until the engine's own loop finishes a sample.
MAX_GROUPS_IN_FLIGHT = 512
# Each kind of call has its own threads: a push must not delay an abort, and replies and a watch must delay neither.
CONCURRENCY = {"generate": MAX_GROUPS_IN_FLIGHT, "control": 1, "abort": 1, "share": 1, "watch": 1, "ping": 1}


class EngineWorker:
    """Runs one engine in its own process: groups generate concurrently, and control calls never wait for a group.

    The number of an in-flight group names one call of ``generate``: an abort finds the call by this number, even where
    the abort arrives first.
    """

    _engine: RolloutEngine

    def __init__(
        self,
        config: Config,
        engine_index: int,
        nodes: Sequence[ray.actor.ActorHandle] = (),
        devices: tuple[str, ...] = (),
    ) -> None:
        self._config, self._index = config, engine_index
        self._nodes, self._devices = nodes, devices
        self._generations: dict[int, Generation] = {}
        self._aborted: set[int] = set()
        self._stopped = threading.Event()

    @ray.method(concurrency_group="control")
    def start(self, is_apart: bool = False) -> EngineStats:
        """Build and start the engine; ``is_apart``: it is to ``serve`` later (MayServeLater)."""
        # Built here: what an actor's constructor raises reaches the caller only as Ray's "the actor died".
        engine_class, site = load(kind_of(self._config).engine), site_here(self._nodes, self._devices)
        self._engine = engine_class(self._config, self._index, make_transport(self._config), site=site)
        if is_apart and isinstance(self._engine, MayServeLater):
            self._engine.start_apart()
        else:
            self._engine.start()
        return self._engine.stats()

    @ray.method(concurrency_group="control")
    def serve(self) -> None:
        if isinstance(self._engine, MayServeLater):
            self._engine.serve()

    @ray.method(concurrency_group="generate", num_returns="streaming")
    def generate(self, request: GroupRequest, number: int) -> Iterator[GeneratedSample]:
        generation = self._generations[number] = self._engine.generate(request)
        try:
            if number in self._aborted:
                generation.abort()
            yield from generation
        finally:
            del self._generations[number]
            self._aborted.discard(number)

    @ray.method(concurrency_group="abort")
    def abort(self, numbers: Sequence[int]) -> None:
        """Abort the generations with these numbers, running or about to start; an ended generation stays as it is."""
        self._aborted.update(numbers)
        for number in numbers:
            if (generation := self._generations.get(number)) is not None:
                generation.abort()

    @ray.method(concurrency_group="share")
    def share(self, replies: Mapping[int, Sequence[EarlierReply]]) -> None:
        """Have running generations, by number, draft from replies; one that has not begun or has ended needs none."""
        for number, heard in replies.items():
            if (generation := self._generations.get(number)) is not None:
                generation.learn(heard)

    @ray.method(concurrency_group="watch")
    def wait_serving(self, known: bool) -> bool:
        """Do what MayStopServing says; any other engine serves as long as its process lives."""
        if isinstance(self._engine, MayStopServing):
            return self._engine.wait_serving(known)
        if known:
            self._stopped.wait()
        return True

    @ray.method(concurrency_group="ping")
    def ping(self) -> None:
        """Answer, whatever else goes on: this process lives and does not hang."""

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
        self._stopped.set()
        if hasattr(self, "_engine"):  # not where ``start`` was refused
            self._engine.stop()


def site_here(nodes: Sequence[ray.actor.ActorHandle] = (), devices: tuple[str, ...] = ()) -> Site:
    """Return the Site of this process; ``nodes`` are the NodeWorkers of an engine's other nodes."""
    bundles = ray.util.get_current_placement_group()
    return Site(
        address=ray.util.get_node_ip_address(),
        num_cluster_nodes=sum(node["Alive"] for node in ray.nodes()),
        others=tuple(RayNode(node) for node in nodes),
        devices=devices,
        run="" if bundles is None else bundles.id.hex(),
    )


@dataclass(frozen=True)
class EngineActors:
    """Names one engine's actors: ``engine`` runs the engine, ``nodes`` own its processes on its other nodes."""

    engine: ray.actor.ActorHandle
    nodes: tuple[ray.actor.ActorHandle, ...]

    def kill(self) -> None:
        """End their processes, also where they are dead or hang."""
        for actor in (self.engine, *self.nodes):
            ray.kill(actor)


def create_engine_actors(config: Config, engine_index: int, placement: Placement) -> EngineActors:
    """Start one engine's actors in their bundles, each with ``num_cpus_per_engine`` compute threads."""
    options = partial(_actor_options, config, engine_index, placement)
    node_class = kind_of(config).node
    nodes = tuple(
        # Ray restarts a NodeWorker that died, perhaps on another node, and repeats its calls: each may be repeated.
        ray.remote(NodeWorker)
        .options(**options(bundle), max_restarts=-1, max_task_retries=-1)
        .remote(node_class, placement.devices_of_bundle(bundle))
        for bundle in (placement.other_nodes_of_rank(engine_index) if node_class is not None else ())
    )
    bundle = placement.bundle_of_rank(engine_index)
    engine = ray.remote(concurrency_groups=CONCURRENCY)(EngineWorker).options(name=None, **options(bundle))
    return EngineActors(engine.remote(config, engine_index, nodes, placement.devices_of_bundle(bundle)), nodes)


def _actor_options(config: Config, engine_index: int, placement: Placement, bundle: int) -> dict[str, Any]:
    threads = str(config.rollout.num_cpus_per_engine)
    return {
        "num_cpus": placement.num_cpus_of_rank(engine_index),
        "num_gpus": placement.num_gpus_of_rank(engine_index),
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            placement_group=placement.placement_group, placement_group_bundle_index=bundle
        ),
        # Two processes that spin at OpenMP barriers on the same cores make each other many times slower.
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}},
    }
