"""Which engines a pool makes again and gives up: by actors that only say what was done to them."""

from __future__ import annotations

from typing import Any

import pytest

from rollout.coordinator import Coordinator, EngineProcessDied
from rollout.fake_calls import FakeCalls
from rollout.members import HOUR_S, Members
from rollout.pool import EnginePool
from slime_spec.config.tree import Config, RolloutConfig
from slime_spec.errors import PushError
from slime_spec.speculation.net_benefit import NetBenefit
from slime_spec.types import EngineStats, SpecCounters
from slime_spec.weights.messages import BeginPush, CancelPush, Manifest, PreparePush


class Actors:
    """Stands in for EngineActors."""

    engine, nodes = None, ()

    def __init__(self) -> None:
        self.num_killed = 0

    def kill(self) -> None:
        self.num_killed += 1


def members(monkeypatch: pytest.MonkeyPatch, clock: list[float], **rollout: Any) -> Members:
    monkeypatch.setattr("rollout.members.create_engine_actors", lambda *_: Actors())
    return Members(Config(rollout=RolloutConfig(**rollout)), None, now=lambda: clock[0])  # type: ignore[arg-type]


def stats(version: int, seconds: float, restarts: int = 0) -> EngineStats:
    benefit = NetBenefit(seconds, 2 * seconds, 0.0, seconds, seconds / 2)
    canary = SpecCounters(num_rounds=3, num_proposed=9, histogram=(1, 2))
    return EngineStats(
        *(version, 1, 2, 3, 4, True, 5),
        time_total_s=seconds,
        time_in_forward_s=seconds / 2,
        num_restarts=restarts,
        num_preemptions=2,
        speculates=True,
        canary=canary,
        benefit=benefit,
    )


def test_no_more_engines_are_made_within_an_hour_than_the_configuration_says(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    made = members(monkeypatch, clock, num_engines=2, max_engine_restarts_per_hour=2)
    for clock[0] in (0.0, 600.0):
        assert made.may_make()
        made.make(1)
    assert not made.may_make()
    clock[0] = HOUR_S
    assert made.may_make(), "the first is an hour old"
    made.make(0)
    assert not made.may_make()


@pytest.mark.parametrize(("num_engines", "expected"), [(1, 6), (64, 64)])
def test_by_default_each_engine_may_be_made_once_and_at_least_six_in_all(
    num_engines: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = members(monkeypatch, [0.0], num_engines=num_engines)
    for _ in range(expected):
        assert made.may_make()
        made.make(0)
    assert not made.may_make()


def test_counts_go_on_over_an_engines_processes_and_the_dead_ones_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made = members(monkeypatch, [0.0], num_engines=1)
    assert made.stats_of(0, stats(3, 10.0)) == stats(3, 10.0)
    dead = made.stats_of(0, None)
    assert (dead.time_total_s, dead.speculates, dead.num_running, dead.canary.num_rounds) == (10.0, False, 0, 0)
    made.make(0)
    made.make(0)  # the first did not start
    now = made.stats_of(0, stats(0, 4.0, restarts=1))
    assert (now.weight_version, now.time_total_s, now.time_in_forward_s) == (0, 14.0, 7.0)
    assert (now.num_restarts, now.num_preemptions) == (3, 4)
    assert now.benefit == NetBenefit(14.0, 28.0, 0.0, 14.0, 7.0)
    again = made.stats_of(0, stats(4, 5.0, restarts=1))
    assert again.time_total_s == 15.0, "the earlier processes count once"


class Pool(EnginePool):
    """A pool whose engines answer as the test says, and are not there."""

    def __init__(self, num_engines: int, errors: dict[int, Exception]) -> None:
        self.errors, self.ended = errors, list[int]()
        self._failed, self._is_unanswered = {}, False
        self._coordinator = Coordinator(FakeCalls(num_engines), num_engines, 8)
        self._calls = self  # type: ignore[assignment]
        self.heartbeats = self

    def forget(self, engine: int) -> None:
        pass

    def end(self, engine: int) -> None:
        self.ended.append(engine)

    def _ask(self, method: str, *arguments: object, timeout_s: float | None = None, also: Any = ()) -> Any:
        living = self._coordinator.living
        failed = {engine: error for engine, error in self.errors.items() if engine in living}
        return {engine: None for engine in living if engine not in failed}, failed


BEGIN = BeginPush(Manifest("target", 7, ()))
DIED, REFUSED = EngineProcessDied("it died"), PushError("its disk is full")


@pytest.mark.parametrize(
    ("errors", "refusing", "given_up"),
    [
        ({1: DIED}, True, [1]),
        ({1: DIED}, False, [1]),
        ({1: REFUSED}, True, [1]),
        ({1: REFUSED}, False, []),  # a draft's push: the engine goes on with the draft that it has
        ({0: REFUSED, 1: REFUSED, 2: REFUSED}, True, []),  # the push is at fault
        ({0: REFUSED, 1: DIED}, True, [1]),  # the other's refusal may be the death's doing
        ({0: DIED, 1: DIED, 2: DIED}, True, [0, 1, 2]),
    ],
)
def test_after_a_push_that_failed_the_dead_are_given_up_and_who_alone_refused(
    errors: dict[int, Exception], refusing: bool, given_up: list[int]
) -> None:
    pool = Pool(3, errors)
    assert pool.receivers() == (0, 1, 2)
    with pytest.raises(PushError):
        pool.broadcast(BEGIN)
    assert pool.leave_out_failed(refusing) == bool(given_up)
    assert sorted(pool.ended) == given_up
    assert pool.receivers() == tuple(engine for engine in range(3) if engine not in given_up)
    assert not pool.leave_out_failed(refusing), "a failure counts once"


def test_undoing_a_push_tells_of_no_failure_twice_and_everything_else_does() -> None:
    pool = Pool(3, {1: REFUSED})
    with pytest.raises(PushError):
        pool.broadcast(BEGIN)
    assert len(pool.broadcast(CancelPush(7))) == 2
    with pytest.raises(PushError):
        pool.broadcast(PreparePush(7, ""))
