"""EnginePool runs all engines as one: prompts go to the least loaded engine, samples stream back, pushes reach all.

generate(groups) ─► Coordinator ─► EngineWorker 0 ─┐
                ▲       └────────► EngineWorker 1 ─┴─► samples, in the order they finish
                └── unfinished samples of an engine that does not serve, to go on at another
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import ray
from ray.exceptions import RayActorError

from rollout.actor import create_engine_actors, site_here
from rollout.coordinator import Call, Coordinator, EngineProcessDied
from rollout.shared_part import shared_part
from slime_spec.config.speculation import reads_replies
from slime_spec.config.tree import Config
from slime_spec.engines import kind_of
from slime_spec.errors import ConfigError
from slime_spec.placement import Placement
from slime_spec.ray_errors import result_of
from slime_spec.request_feed import RequestFeed
from slime_spec.types import EarlierReply, EngineStats, GeneratedSample, GroupRequest
from slime_spec.weights.messages import CancelPush, ContinueGeneration, PushMessage, PushReply

__all__ = ["EnginePool", "EngineProcessDied", "RayCalls"]

# An engine whose thread is not ended keeps its process alive after Ray has gone.
STOP_TIMEOUT_S = 10.0
# How long a failed push waits for the engines to undo it: they take the message in turn, however long that lasts.
UNDO_TIMEOUT_S = 10.0


class RayCalls:
    """Implements EngineCalls for engines that are Ray actors."""

    def __init__(self, actors: Sequence[ray.actor.ActorHandle]) -> None:
        self._actors = actors

    def generate(self, engine: int, request: GroupRequest, number: int) -> Call:
        return cast(Call, self._actors[engine].generate.remote(request, number))

    def abort(self, engine: int, numbers: Sequence[int]) -> None:
        self._actors[engine].abort.remote(numbers)

    def share(self, engine: int, replies: Mapping[int, Sequence[EarlierReply]]) -> None:
        self._actors[engine].share.remote(replies)

    def watch(self, engine: int, known: bool) -> Call:
        return cast(Call, self._actors[engine].wait_serving.remote(known))

    def ready(self, calls: list[Call], timeout_s: float) -> Sequence[Call]:
        """See EngineCalls. A busy driver waits once for all that has come since its last wait; an idle one blocks."""
        ready: list[Call] = ray.wait(calls, num_returns=len(calls), timeout=0, fetch_local=False)[0]
        if not ready and timeout_s > 0:
            ready = ray.wait(calls, num_returns=1, timeout=timeout_s, fetch_local=False)[0]
        return ready

    def next_sample(self, stream: Call) -> GeneratedSample | None:
        assert isinstance(stream, ray.ObjectRefGenerator), "samples come in streams"
        try:
            return cast(GeneratedSample, result_of(next(stream)))
        except StopIteration:
            return None
        except RayActorError as error:
            raise EngineProcessDied(str(error)) from error

    def serves(self, watch: Call) -> bool:
        try:
            return bool(result_of(watch))
        except RayActorError as error:
            raise EngineProcessDied(str(error)) from error


class EnginePool:
    """Owns all rollout engines of a run. Use as a context manager: leaving it stops the engines and their actors.

    The Coordinator says what becomes of the samples of an engine that loses its server (MayStopServing) or whose
    process dies. After such a death the next push (or any other call to all engines) raises EngineProcessDied.
    """

    def __init__(self, config: Config, placement: Placement) -> None:
        self._shared = shared_part(config, site_here())
        self._config = self._shared.engine_config
        created = [create_engine_actors(self._config, i, placement) for i in range(config.rollout.num_engines)]
        self._actors = [actors.engine for actors in created]
        self._node_actors = [node for actors in created for node in actors.nodes]
        # Room for more than an engine decodes at once: its queue does not run dry before the next group reaches it.
        room = 2 * self._config.engine.max_running_requests
        self._coordinator = Coordinator(
            RayCalls(self._actors), len(self._actors), room, shares_replies=reads_replies(config)
        )
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

    def generate(self, requests: Sequence[GroupRequest] | RequestFeed) -> Iterator[GeneratedSample]:
        """Generate every group, one call at a time; samples come as they finish, whichever engine they ran on.

        Raises what ended an engine for good (EngineFailed), and EngineProcessDied once no engine's process is left.
        """
        return self._coordinator.generate(requests)

    def abort(self) -> None:
        """End the generation in progress, if there is one, as Engines says; may be called from any thread."""
        self._coordinator.abort()

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
