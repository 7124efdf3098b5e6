"""EnginePool runs all engines as one: prompts go to the least loaded engine, samples stream back, pushes reach all.

generate(groups) ─► Coordinator ─► EngineWorker 0 ─┐
                ▲       └────────► EngineWorker 1 ─┴─► samples, in the order they finish
                └── unfinished samples of an engine that does not serve, to go on at another
    Members: the engines' actors, and others in place of those that died ◄── Heartbeats: end those that hang
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import ray
from ray.exceptions import RayActorError

from rollout.actor import site_here
from rollout.coordinator import Call, Coordinator, EngineProcessDied
from rollout.heartbeats import Heartbeats
from rollout.members import Members
from rollout.shared_part import shared_part
from slime_spec.config.speculation import reads_replies
from slime_spec.config.tree import Config
from slime_spec.engines import kind_of
from slime_spec.errors import ConfigError, PushError
from slime_spec.interfaces import BringUp
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
    """Implements EngineCalls, and Pings, for engines that are Ray actors.

    ``start_timeout_s`` and ``answer_timeout_s`` are how long a process may be silent before it serves, and later.
    """

    def __init__(self, members: Members, start_timeout_s: float, answer_timeout_s: float, interval_s: float) -> None:
        self._members = members
        self._start_timeout_s, self._answer_timeout_s = start_timeout_s, answer_timeout_s
        self.heartbeats = Heartbeats(self, interval_s)
        self.bring_up: BringUp = lambda engine, broadcast: True

    def generate(self, engine: int, request: GroupRequest, number: int) -> Call:
        return cast(Call, self._members.engine(engine).generate.remote(request, number))

    def abort(self, engine: int, numbers: Sequence[int]) -> None:
        self._members.engine(engine).abort.remote(numbers)

    def share(self, engine: int, replies: Mapping[int, Sequence[EarlierReply]]) -> None:
        self._members.engine(engine).share.remote(replies)

    def watch(self, engine: int, known: bool) -> Call:
        return cast(Call, self._members.engine(engine).wait_serving.remote(known))

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
            raise EngineProcessDied(first_line(error)) from error

    def serves(self, watch: Call) -> bool:
        try:
            return bool(result_of(watch))
        except RayActorError as error:
            raise EngineProcessDied(first_line(error)) from error

    def replace(self, engine: int) -> Call | None:
        if not self._members.may_make():
            return None
        self._members.make(engine)
        self.heartbeats.expect(engine, self._start_timeout_s)
        return cast(Call, self._members.engine(engine).start.remote())

    def join(self, engine: int, start: Call) -> bool:
        try:
            self._members.stats_of(engine, result_of(start))
            self.heartbeats.expect(engine, self._answer_timeout_s)
            return self.bring_up(engine, lambda message: [self._updated(engine, message)])
        except (RayActorError, ConfigError, PushError) as error:
            raise EngineProcessDied(first_line(error)) from error

    def ping(self, engine: int) -> Call:
        return cast(Call, self._members.engine(engine).ping.remote())

    def answered(self, call: Call) -> bool:
        return bool(ray.wait([call], timeout=0, fetch_local=False)[0])

    def end(self, engine: int) -> None:
        ray.kill(self._members.engine(engine))

    def _updated(self, engine: int, message: PushMessage) -> PushReply:
        return cast(PushReply, result_of(self._members.engine(engine).update_weights.remote(message)))


def first_line(error: Exception) -> str:
    """Return what an error of Ray says, without the identifiers below it."""
    return str(error).partition("\n")[0]


class EnginePool:
    """Owns all rollout engines of a run. Use as a context manager: leaving it stops the engines and their actors.

    The Coordinator says what becomes of the samples of an engine that loses its server (MayStopServing) or whose
    process dies. A process that died or hangs is replaced in the next generation, or in the one that runs.
    """

    def __init__(self, config: Config, placement: Placement) -> None:
        self._shared = shared_part(config, site_here())
        self._config = self._shared.engine_config
        rollout, self._start_timeout_s = config.rollout, kind_of(config).start_timeout_s(config)
        self._members = Members(self._config, placement, rollout.max_engine_restarts_per_hour)
        timeouts = self._start_timeout_s, rollout.health_check_timeout_s, rollout.health_check_interval_s
        self._calls = RayCalls(self._members, *timeouts)
        # Room for more than an engine decodes at once: its queue does not run dry before the next group reaches it.
        room = 2 * self._config.engine.max_running_requests
        self._coordinator = Coordinator(self._calls, len(self._members), room, shares_replies=reads_replies(config))
        self._failed: dict[int, Exception] = {}  # by engine, in the push that runs

    def __enter__(self) -> EnginePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> list[EngineStats]:
        """Load every engine; raises the engine's own ConfigError, or a ConfigError about the timeout."""
        self._shared.start()
        calls = [self._members.engine(engine).start.remote() for engine in self._coordinator.living]
        try:
            self._shared.wait_until_ready()
            started = result_of(calls, self._start_timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise ConfigError(
                "cluster.actor_start_timeout_s",
                "engines must start within it",
                self._start_timeout_s,
                "Raise it, or give Ray the resources the engines ask for.",
            ) from None
        for engine in self._coordinator.living:
            self._calls.heartbeats.expect(engine, self._config.rollout.health_check_timeout_s)
        self._calls.heartbeats.start()
        return [self._members.stats_of(engine, stats) for engine, stats in enumerate(started)]

    def generate(self, requests: Sequence[GroupRequest] | RequestFeed) -> Iterator[GeneratedSample]:
        """Generate every group, one call at a time; samples come as they finish, whichever engine they ran on.

        Raises what ended an engine for good (EngineFailed), and EngineProcessDied once no engine's process is left, or
        one may not be replaced.
        """
        return self._coordinator.generate(requests)

    def abort(self) -> None:
        """End the generation in progress, if there is one, as Engines says; may be called from any thread."""
        self._coordinator.abort()

    def receivers(self) -> tuple[int, ...]:
        self._failed = {}
        return tuple(self._coordinator.living)

    def broadcast(self, message: PushMessage) -> list[PushReply]:
        """Deliver one push message to every living engine; raises if one refuses, or has died, that had not failed yet.

        The others get it all the same. After a failure nothing waits long for engines to undo a push: one may hang.
        """
        undoes = self._failed and isinstance(message, CancelPush | ContinueGeneration)
        replies, failed = self._ask("update_weights", message, timeout_s=UNDO_TIMEOUT_S if undoes else None)
        newly_failed = [error for engine, error in failed.items() if engine not in self._failed]
        self._failed = failed | self._failed
        if newly_failed:
            raise newly_failed[0]
        return list(replies.values())

    def leave_out_failed(self, refusing: bool) -> bool:
        """See Engines."""
        living, failed, self._failed = len(self._coordinator.living), self._failed, {}
        if not refusing or len(failed) == living:
            failed = {engine: error for engine, error in failed.items() if isinstance(error, EngineProcessDied)}
        for engine, error in failed.items():
            self._bury(engine, EngineProcessDied(f"in a push: {error}"))
        return bool(failed)

    def bring_up_with(self, bring_up: BringUp) -> None:
        self._calls.bring_up = bring_up

    def set_resident(self, resident: bool) -> list[EngineStats]:
        return self._stats("set_resident", resident)

    def stats(self) -> list[EngineStats]:
        return self._stats("stats")

    def _stats(self, method: str, *arguments: object) -> list[EngineStats]:
        """Call a method of every living engine that returns its stats; of a dead one these are the last known."""
        stats, failed = self._ask(method, *arguments)
        for engine, error in failed.items():
            if not isinstance(error, EngineProcessDied):
                raise error
            self._bury(engine, error)
        return [self._members.stats_of(engine, stats.get(engine)) for engine in range(len(self._members))]

    def _bury(self, engine: int, error: EngineProcessDied) -> None:
        self._calls.heartbeats.forget(engine)
        self._calls.end(engine)
        self._coordinator.bury(engine, error)

    def _ask(
        self, method: str, *arguments: object, timeout_s: float | None = None
    ) -> tuple[dict[int, Any], dict[int, Exception]]:
        """Call a method of every living engine; returns the results and the errors by engine."""
        living = self._coordinator.living
        calls = {engine: getattr(self._members.engine(engine), method).remote(*arguments) for engine in living}
        if calls:
            ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout_s)
        results: dict[int, Any] = {}
        errors: dict[int, Exception] = {}
        for engine, call in calls.items():
            try:
                results[engine] = result_of(call, timeout_s and 0.0)
            except RayActorError as error:
                errors[engine] = EngineProcessDied(f"an engine's process died: {first_line(error)}")
            except Exception as error:  # noqa: BLE001 - broadcast and _stats raise it
                errors[engine] = error
        return results, errors

    def stop(self) -> None:
        """End the engines, then their processes; a process that does not answer is killed."""
        self._calls.heartbeats.stop()
        stops = [self._members.engine(engine).stop.remote() for engine in self._coordinator.living]
        if stops:
            ray.wait(stops, num_returns=len(stops), timeout=STOP_TIMEOUT_S)
        self._members.stop()
        self._shared.stop()
