"""EnginePool runs all engines as one: prompts go to the least loaded engine, samples stream back, pushes reach all.

generate(groups) ─► InFlightGroups ─► EngineWorker 0 ─┐
                ▲         └─────────► EngineWorker 1 ─┴─► samples, in the order they finish
                └── unfinished samples of an engine that does not serve, to go on at another
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from itertools import count
from typing import Any

import ray
from ray.exceptions import RayActorError

from rollout.actor import create_engine_actors, site_here
from rollout.dispatch import Dispatcher
from rollout.in_flight import InFlightGroup, InFlightGroups
from rollout.shared_part import shared_part
from slime_spec.config.tree import Config
from slime_spec.engines import kind_of
from slime_spec.errors import ConfigError
from slime_spec.placement import Placement
from slime_spec.ray_errors import result_of
from slime_spec.types import EngineStats, GeneratedSample, GroupRequest
from slime_spec.weights.messages import CancelPush, ContinueGeneration, PushMessage, PushReply

logger = logging.getLogger(__name__)

# An engine whose thread is not ended keeps its process alive after Ray has gone.
STOP_TIMEOUT_S = 10.0
# How long a failed push waits for the engines to undo it: they take the message in turn, however long that lasts.
UNDO_TIMEOUT_S = 10.0
# How long an abort from another thread may go unnoticed while nothing arrives.
ABORT_POLL_S = 0.2


class EngineProcessDied(RuntimeError):
    """An engine's own process has ended and is not restarted: its weights and its part in pushes are gone."""


class EnginePool:
    """Owns all rollout engines of a run. Use as a context manager: leaving it stops the engines and their actors.

    An engine that loses its server (MayStopServing) gets no group until it serves again, and other engines that serve
    resume its partial samples; where no engine serves, samples wait in their engine. An engine whose process dies is
    lost: other engines take its samples as they were when it got them, an ERROR is logged, and the next push (or any
    other call to all engines) raises EngineProcessDied.
    """

    def __init__(self, config: Config, placement: Placement) -> None:
        self._shared = shared_part(config, site_here())
        self._config = self._shared.engine_config
        created = [create_engine_actors(self._config, i, placement) for i in range(config.rollout.num_engines)]
        self._actors = [actors.engine for actors in created]
        self._node_actors = [node for actors in created for node in actors.nodes]
        self._serving = [True] * len(self._actors)
        self._dead: dict[int, RayActorError] = {}
        self._watches: dict[ray.ObjectRef, int] = {}
        self._group_numbers = count()
        self._num_aborts = 0
        self._broadcast_failed = False

    def __enter__(self) -> EnginePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> list[EngineStats]:
        """Load every engine; raises the engine's own ConfigError, or a ConfigError about the timeout."""
        timeout_s = kind_of(self._config).start_timeout_s(self._config)
        self._shared.start()
        calls = [actor.start.remote() for actor in self._actors]
        try:
            self._shared.wait_until_ready()
            return result_of(calls, timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise ConfigError(
                "cluster.actor_start_timeout_s",
                "engines must start within it",
                timeout_s,
                "Raise it, or give Ray the resources the engines ask for.",
            ) from None

    def generate(self, requests: Sequence[GroupRequest]) -> Iterator[GeneratedSample]:
        """Generate every group, one call at a time; samples come as they finish, whichever engine they ran on.

        Raises what ended an engine for good (EngineFailed), and EngineProcessDied once no engine's process is left.
        """
        room = 2 * self._config.engine.max_running_requests
        groups = InFlightGroups(requests, Dispatcher(self._serving, room), self._group_numbers)
        return self._samples(groups, self._num_aborts)

    def abort(self) -> None:
        """End the generation in progress, if there is one, as Engines says; may be called from any thread."""
        self._num_aborts += 1

    def broadcast(self, message: PushMessage) -> list[PushReply]:
        """Deliver one push message to every engine; raises if any of them refuses, or has died.

        The others get it all the same. After a failure nothing waits long for engines to undo a push: one may hang.
        """
        undoes = self._broadcast_failed and isinstance(message, CancelPush | ContinueGeneration)
        self._broadcast_failed = True
        replies = self._on_all("update_weights", message, timeout_s=UNDO_TIMEOUT_S if undoes else None)
        self._broadcast_failed = False
        return replies

    def set_resident(self, resident: bool) -> list[EngineStats]:
        return self._on_all("set_resident", resident)

    def stats(self) -> list[EngineStats]:
        return self._on_all("stats")

    def _samples(self, groups: InFlightGroups, num_aborts: int) -> Iterator[GeneratedSample]:
        streams: dict[ray.ObjectRefGenerator, InFlightGroup] = {}
        self._hear_all()
        while groups.has_unfinished:
            if self._num_aborts > num_aborts and not groups.is_aborted:
                self._abort(groups.on_engines)
                yield from groups.abort()
            for group in groups.launch():
                streams[self._actors[group.engine].generate.remote(group.request, group.number)] = group
            self._abort(groups.recall())
            self._watch_all()
            for ref in self._ready([*self._watches, *streams], ABORT_POLL_S):
                if ref in self._watches:
                    self._hear(ref)
                else:
                    yield from self._next(ref, streams, groups)

    def _ready(self, refs: Collection[Any], timeout_s: float) -> list[Any]:
        """Return a reference with a result, if any has it in time; raises EngineProcessDied where no engine is left."""
        if len(self._dead) == len(self._actors):
            *_, last = self._dead.values()
            raise EngineProcessDied(f"no engine is left: their processes have died, the last so: {last}") from last
        ready: list[Any] = ray.wait(list(refs), num_returns=1, timeout=timeout_s, fetch_local=False)[0]
        return ready

    def _next(
        self,
        stream: ray.ObjectRefGenerator,
        streams: dict[ray.ObjectRefGenerator, InFlightGroup],
        groups: InFlightGroups,
    ) -> list[GeneratedSample]:
        """Return the caller's samples out of the next item of a stream."""
        group = streams[stream]
        try:
            sample = groups.arrived(group, result_of(next(stream)))
            return [] if sample is None else [sample]
        except StopIteration:
            del streams[stream]
            return groups.ended(group)
        except RayActorError as error:
            del streams[stream]
            self._bury(group.engine, error)
            return groups.lost(group)

    def _abort(self, groups: Sequence[InFlightGroup]) -> None:
        for engine in {group.engine for group in groups} - self._dead.keys():
            numbers = [group.number for group in groups if group.engine == engine]
            self._actors[engine].abort.remote(numbers)

    def _watch_all(self) -> None:
        """Have every engine report when it starts or stops serving."""
        for engine in set(range(len(self._actors))) - self._dead.keys() - set(self._watches.values()):
            self._watches[self._actors[engine].wait_serving.remote(self._serving[engine])] = engine

    def _hear_all(self) -> None:
        """Note what has changed since the last generation; a server that was lost and replaced reports twice."""
        self._watch_all()
        timeout_s = 0.0
        while heard := self._ready(self._watches, timeout_s):
            for watch in heard:
                self._hear(watch)
            self._watch_all()
            timeout_s = ABORT_POLL_S

    def _hear(self, watch: ray.ObjectRef) -> None:
        engine = self._watches.pop(watch)
        try:
            self._serving[engine] = result_of(watch)
        except RayActorError as error:
            self._bury(engine, error)
        else:
            logger.warning(
                "engine %s engine=%d", "serves again" if self._serving[engine] else "lost its server", engine
            )

    def _bury(self, engine: int, error: RayActorError) -> None:
        """Go on without an engine whose process has died."""
        if engine in self._dead:
            return
        self._dead[engine] = error
        self._serving[engine] = False
        logger.error("engine process died, others take over its samples engine=%d error=%s", engine, error)

    def _on_all(self, method: str, *arguments: object, timeout_s: float | None = None) -> list[Any]:
        calls = [getattr(actor, method).remote(*arguments) for actor in self._actors]
        try:
            results: list[Any] = result_of(calls, timeout_s)
        except RayActorError as error:
            raise EngineProcessDied(
                f"an engine's process died, and no other is made: resume the run from its last checkpoint ({error})"
            ) from error
        return results

    def stop(self) -> None:
        """End the engines, then their processes; a process that does not answer is killed."""
        ray.wait([actor.stop.remote() for actor in self._actors], num_returns=len(self._actors), timeout=STOP_TIMEOUT_S)
        for actor in self._actors:
            ray.kill(actor)
        for node in self._node_actors:
            ray.kill(node)
        self._actors, self._node_actors = [], []
        self._shared.stop()
