"""Which engines are asked and ended when, by a clock that the test turns; and a real process that hangs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path

import psutil

from rollout.heartbeats import Heartbeats
from rollout.pool import EnginePool
from slime_spec.launch.cluster import cluster
from tests.ray.test_pool import requests
from tests.support.engine_processes import process_of
from tests.support.fake_config import fake_engine_config


class Asked:
    """Engines that answer unless they are ``silent``."""

    def __init__(self) -> None:
        self.silent: set[int] = set()
        self.asked: list[int] = []
        self.ended: list[int] = []

    def ping(self, engine: int) -> Hashable:
        self.asked.append(engine)
        return engine

    def answered(self, call: Hashable) -> bool:
        return call not in self.silent

    def end(self, engine: int) -> None:
        self.ended.append(engine)


def test_an_engine_is_ended_once_it_is_silent_for_longer_than_it_may() -> None:
    engines, clock = Asked(), [0.0]
    beats = Heartbeats(engines, 10.0, now=lambda: clock[0])
    beats.expect(0, 60.0)
    beats.expect(1, 30.0)
    engines.silent = {1}
    for clock[0] in (0.0, 10.0, 20.0, 30.0):
        beats.beat()
    assert engines.ended == []
    assert engines.asked.count(1) == 1, "it still owes the first answer"
    assert engines.asked.count(0) == 4
    for clock[0] in (30.1, 40.0, 50.0):
        beats.beat()
    assert engines.ended == [1], "and nothing is expected of it any more"


def test_an_answer_that_comes_late_but_in_time_counts_and_one_of_another_process_does_not() -> None:
    engines, clock = Asked(), [0.0]
    beats = Heartbeats(engines, 10.0, now=lambda: clock[0])
    beats.expect(0, 30.0)
    engines.silent = {0}
    for clock[0] in (0.0, 29.0):
        beats.beat()
    engines.silent = set()
    for clock[0] in (30.0, 59.0):
        beats.beat()
    engines.silent = {0}
    beats.expect(0, 300.0)  # a process in its place, which starts
    for clock[0] in (60.0, 95.0, 360.0):
        beats.beat()
    assert engines.ended == []
    beats.forget(0)
    for clock[0] in (400.0, 900.0):
        beats.beat()
    assert engines.ended == []


def test_a_process_that_answers_but_does_not_start_in_time_is_ended() -> None:
    engines, clock = Asked(), [0.0]
    beats = Heartbeats(engines, 10.0, now=lambda: clock[0])
    for engine in (0, 1):
        beats.expect_start(engine, 60.0)
    for clock[0] in (0.0, 30.0, 59.0):
        beats.beat()
    beats.expect(1, 30.0)  # it has started
    for clock[0] in (60.0, 61.0, 90.0):
        beats.beat()
    assert engines.ended == [0]


def test_an_engine_that_cannot_be_asked_does_not_end_the_watch_over_the_others() -> None:
    class Refusing(Asked):
        def ping(self, engine: int) -> Hashable:
            if engine == 0 and self.asked.count(0) == 1:
                self.asked.append(0)
                raise RuntimeError("the actor was just killed")
            return super().ping(engine)

    engines = Refusing()
    beats = Heartbeats(engines, 0.01)
    for engine in (0, 1):
        beats.expect(engine, 60.0)
    beats.start()
    deadline = time.monotonic() + 30
    while engines.asked.count(1) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    beats.stop()
    assert engines.asked.count(1) >= 5
    assert engines.asked.count(0) >= 3


def test_a_lone_engine_whose_process_hangs_is_ended_and_replaced_within_the_generation(tmp_path: Path) -> None:
    config = fake_engine_config(tmp_path)
    rollout = replace(config.rollout, num_engines=1, health_check_interval_s=0.2, health_check_timeout_s=2.0)
    config = replace(config, rollout=rollout)
    with cluster(config, None) as reserved, EnginePool(config, reserved.engines) as pool:
        pool.start()
        hung = psutil.Process(process_of(pool, 0))
        os.kill(hung.pid, signal.SIGSTOP)
        asked = requests(3)
        samples = list(pool.generate(asked))
        assert sorted((each.group_id, each.sample_index) for each in samples) == [
            (f"g{group}", index) for group in range(3) for index in range(3)
        ]
        assert process_of(pool, 0) != hung.pid
        assert not hung.is_running() or hung.status() == psutil.STATUS_ZOMBIE
        assert [stats.num_restarts for stats in pool.stats()] == [1]
