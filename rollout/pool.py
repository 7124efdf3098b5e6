"""The engines as one: prompts go to the least loaded, finished samples stream back, pushes reach all of them.

generate(groups) ─► Dispatcher ─► EngineWorker 0 ─┐
                             └──► EngineWorker 1 ─┴─► samples, in the order they finish
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import ray
from ray.exceptions import RayActorError, RayTaskError

from rollout.actor import create_engine_actor
from rollout.dispatch import Dispatcher
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError, PushError
from slime_spec.placement import Placement
from slime_spec.types import EngineStats, GeneratedSample, GroupRequest
from slime_spec.weights.push import PushMessage, PushReply

# An engine whose thread is not ended keeps its process alive after Ray has gone.
STOP_TIMEOUT_S = 10.0


@dataclass
class _InFlight:
    """A group on an engine; ``num_left`` samples have not come back."""

    engine: int
    group_id: str
    num_left: int


class EnginePool:
    """All rollout engines of a run. Use as a context manager: leaving it stops the engines and their actors."""

    def __init__(self, config: Config, placement: Placement) -> None:
        self._config = config
        self._actors = [create_engine_actor(config, i, placement) for i in range(config.rollout.num_engines)]

    def __enter__(self) -> EnginePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> list[EngineStats]:
        """Load every engine; raises the engine's own ConfigError, or one about the timeout."""
        timeout_s = self._config.cluster.actor_start_timeout_s
        calls = [actor.start.remote() for actor in self._actors]
        try:
            return _unwrapped(lambda: ray.get(calls, timeout=timeout_s))
        except ray.exceptions.GetTimeoutError:
            raise ConfigError(
                "cluster.actor_start_timeout_s",
                "engines must start within it",
                timeout_s,
                "Raise it, or give Ray the resources the engines ask for.",
            ) from None

    def generate(self, requests: Sequence[GroupRequest]) -> Iterator[GeneratedSample]:
        """Generate every group; samples come in the order in which they finish, whichever engine they ran on."""
        waiting = deque(requests)
        dispatcher = Dispatcher(len(self._actors), 2 * self._config.engine.max_running_requests)
        in_flight: dict[ray.ObjectRefGenerator, _InFlight] = {}
        while waiting or in_flight:
            while waiting and (engine := dispatcher.assign(len(waiting[0].seeds))) is not None:
                group = waiting.popleft()
                stream = self._actors[engine].generate.remote(group)
                in_flight[stream] = _InFlight(engine, group.group_id, len(group.seeds))
            ready, _ = ray.wait(list(in_flight), num_returns=1, fetch_local=False)
            for stream in ready:
                sample = self._next(stream, in_flight[stream])
                if sample is None:
                    del in_flight[stream]
                    continue
                dispatcher.finished(in_flight[stream].engine)
                in_flight[stream].num_left -= 1
                yield sample

    def _next(self, stream: ray.ObjectRefGenerator, flight: _InFlight) -> GeneratedSample | None:
        try:
            sample: GeneratedSample = _unwrapped(lambda: ray.get(next(stream)))
            return sample
        except StopIteration:
            assert flight.num_left == 0, f"{flight.group_id} ended with {flight.num_left} samples missing"
            return None
        except RayActorError as error:
            raise RuntimeError(f"engine {flight.engine} died while it generated {flight.group_id}: {error}") from error

    def abort(self) -> None:
        """Let everything being generated finish now with what it has."""
        ray.get([actor.abort.remote() for actor in self._actors])

    def broadcast(self, message: PushMessage) -> list[PushReply]:
        """Deliver one push message to every engine; raises if any of them refuses."""
        calls = [actor.update_weights.remote(message) for actor in self._actors]
        return _unwrapped(lambda: ray.get(calls))

    def set_resident(self, resident: bool) -> list[EngineStats]:
        return ray.get([actor.set_resident.remote(resident) for actor in self._actors])

    def stats(self) -> list[EngineStats]:
        return ray.get([actor.stats.remote() for actor in self._actors])

    def stop(self) -> None:
        """End the engines, then their processes; one that does not answer is killed all the same."""
        ray.wait([actor.stop.remote() for actor in self._actors], num_returns=len(self._actors), timeout=STOP_TIMEOUT_S)
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []


def _unwrapped(call):  # type: ignore[no-untyped-def]
    """Raise the actor's own exception where it is one of ours, not Ray's wrapping of it."""
    try:
        return call()
    except RayTaskError as error:
        if isinstance(error.cause, ConfigError | PushError):
            raise error.cause from None
        raise
