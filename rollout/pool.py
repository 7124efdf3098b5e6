"""EnginePool runs all engines as one: prompts go to the least loaded engine, samples stream back, pushes reach all.

generate(groups) ─► Coordinator ─► EngineWorker 0 ─┐
                ▲       └────────► EngineWorker 1 ─┴─► samples, in the order they finish
                └── unfinished samples of an engine that does not serve, to go on at another
    Members: the engines' actors, and others in place of those that died ◄── Heartbeats: end those that hang
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import ray
from ray.exceptions import GetTimeoutError, NodeDiedError, ObjectLostError, RayActorError, RayTaskError

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
from slime_spec.weights.messages import (
    BeginPush,
    CancelPush,
    ContinueGeneration,
    PauseGeneration,
    PushMessage,
    PushReply,
)

__all__ = ["EnginePool", "EngineProcessDied", "RayCalls"]

logger = logging.getLogger(__name__)

# What reading from a process raises that is no more; a result may be lost with the machine that it was on.
GONE = (RayActorError, ObjectLostError, NodeDiedError)
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
        except GONE as error:
            raise EngineProcessDied(first_line(error)) from error

    def serves(self, watch: Call) -> bool:
        try:
            return bool(result_of(watch))
        except GONE as error:
            raise EngineProcessDied(first_line(error)) from error

    def replace(self, engine: int) -> Call | None:
        if not self._members.may_make():
            return None
        self._members.make(engine)
        self.heartbeats.expect_start(engine, self._start_timeout_s)
        return cast(Call, self._members.engine(engine).start.remote(is_apart=True))

    def join(self, engine: int, start: Call) -> bool:
        """See EngineCalls; raises what the trainer raises while it sends its weights."""
        failed: list[Exception] = []

        def broadcast(message: PushMessage) -> Sequence[PushReply]:
            try:
                return [self._called(engine, "update_weights", message)]
            except Exception as error:
                failed.append(error)
                raise

        try:
            self._members.stats_of(engine, self._result(start))
            self.heartbeats.expect(engine, self._answer_timeout_s)
            if not self.bring_up(engine, broadcast):
                return False
            self._called(engine, "serve")
        except EngineProcessDied:
            raise
        except PushError as error:
            if not failed:
                raise
            raise EngineProcessDied(first_line(error)) from error
        return True

    def _called(self, engine: int, method: str, *arguments: object) -> Any:
        return self._result(getattr(self._members.engine(engine), method).remote(*arguments))

    def _result(self, call: Call) -> Any:
        """Return a call's result; raises EngineProcessDied where the engine died, or raised anything at all."""
        try:
            return result_of(call)
        except (*GONE, RayTaskError, ConfigError, PushError) as error:
            raise EngineProcessDied(first_line(error)) from error

    def ping(self, engine: int) -> Call:
        return cast(Call, self._members.engine(engine).ping.remote())

    def answered(self, call: Call) -> bool:
        return bool(ray.wait([call], timeout=0, fetch_local=False)[0])

    def end(self, engine: int) -> None:
        ray.kill(self._members.engine(engine))


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
        self._members = Members(self._config, placement)
        timeouts = self._start_timeout_s, rollout.health_check_timeout_s, rollout.health_check_interval_s
        self._calls = RayCalls(self._members, *timeouts)
        # Room for more than an engine decodes at once: its queue does not run dry before the next group reaches it.
        room = 2 * self._config.engine.max_running_requests
        self._coordinator = Coordinator(self._calls, len(self._members), room, shares_replies=reads_replies(config))
        self._failed: dict[int, Exception] = {}  # by engine, in the push that runs
        self._is_unanswered = False  # a message of it, as an interrupt came

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
        except GetTimeoutError:
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
        """Deliver one push message to every living engine; raises PushError if one died, and its error if one refuses.

        The others get the message all the same. After a failure nothing waits long for engines to undo a push: one may
        hang.
        """
        if isinstance(message, PauseGeneration | BeginPush):
            self._failed, self._is_unanswered = {}, False
        undoes = isinstance(message, CancelPush | ContinueGeneration) and (self._is_unanswered or bool(self._failed))
        self._is_unanswered = True
        replies, failed = self._ask("update_weights", message, timeout_s=UNDO_TIMEOUT_S if undoes else None)
        self._is_unanswered = undoes
        if undoes:  # who takes long to undo has not failed by that, and who had failed is known
            failed = {engine: error for engine, error in failed.items() if not isinstance(error, GetTimeoutError)}
        raised = [error for engine, error in failed.items() if not (undoes and engine in self._failed)]
        self._failed = failed | self._failed
        for error in raised:
            if isinstance(error, EngineProcessDied):
                raise PushError(str(error)) from error
            raise error
        return list(replies.values())

    def leave_out_failed(self, refusing: bool) -> bool:
        """See Engines. Where one died, what others refused may be its doing: they take part in the next try."""
        living, failed, self._failed = len(self._coordinator.living), self._failed, {}
        died = {engine: error for engine, error in failed.items() if isinstance(error, EngineProcessDied)}
        given_up = failed if refusing and not died and len(failed) < living else died
        for engine, error in given_up.items():
            self._bury(engine, EngineProcessDied(f"in a push: {error}"))
        return bool(given_up)

    def bring_up_with(self, bring_up: BringUp) -> None:
        self._calls.bring_up = bring_up

    def set_resident(self, resident: bool) -> list[EngineStats]:
        """See Engines. A process that starts meanwhile would take the trainer's memory: it is waited for first."""
        for engine, start in self._coordinator.coming.items():
            logger.info("waiting for an engine that is started anew engine=%d", engine)
            ray.wait([start], timeout=None)  # ended, where it takes too long, by the heartbeats
        return self._stats("set_resident", resident, also=list(self._coordinator.coming))

    def stats(self) -> list[EngineStats]:
        return self._stats("stats")

    def _stats(self, method: str, *arguments: object, also: Sequence[int] = ()) -> list[EngineStats]:
        """Call a method that returns stats of every living engine, and of ``also``; of a dead one they are the last."""
        stats, failed = self._ask(method, *arguments, also=also)
        for engine, error in failed.items():
            if engine in also:
                continue  # the next generation hears of it
            if not isinstance(error, EngineProcessDied):
                raise error
            self._bury(engine, error)
        return [
            self._members.stats_of(engine, None if engine in also else stats.get(engine))
            for engine in range(len(self._members))
        ]

    def _bury(self, engine: int, error: EngineProcessDied) -> None:
        self._calls.heartbeats.forget(engine)
        self._calls.end(engine)
        self._coordinator.bury(engine, error)

    def _ask(
        self, method: str, *arguments: object, timeout_s: float | None = None, also: Sequence[int] = ()
    ) -> tuple[dict[int, Any], dict[int, Exception]]:
        """Call a method of every living engine, and of ``also``; returns the results and the errors by engine."""
        asked = [*self._coordinator.living, *also]
        calls = {engine: getattr(self._members.engine(engine), method).remote(*arguments) for engine in asked}
        if calls:
            ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout_s)
        results: dict[int, Any] = {}
        errors: dict[int, Exception] = {}
        for engine, call in calls.items():
            try:
                results[engine] = result_of(call, timeout_s and 0.0)
            except GONE as error:
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
