"""The benchmark of the coordinator measures the driver's Python a sample, by the number of engines.

Engines are fakes in this process whose samples were made before, and the calls to them are fakes as well: what is timed
is the coordinator with the books of its groups and loads. Ray is not in it; the fakes are, and their own share stands
beside it. With SHARING every group is split over several engines, and what its samples say reaches all of them.
"""

from __future__ import annotations

import gc
import math
import statistics
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice

from rollout.coordinator import Call, Coordinator
from rollout.fake_calls import FakeCalls
from slime_spec.bench.rows import Benchmark, BenchOptions, Row, at_most
from slime_spec.bench.timing import Timed, interleaved
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams

PARTS = {"engines": "slime_spec.bench.coordinator:measure"}
MOST_US = 100.0  # of CPU a sample, at the largest number of engines
MOST_GROWTH = 1.25  # CPU of a generation over its samples, as an exponent: 1 is linear
ONE_AT_A_TIME, TOGETHER = "one", "many"
OURS, SHARING, FAKES = "driver", "sharing", "fakes"


@dataclass(frozen=True)
class CoordinatorSizes:
    """Holds what is measured; the groups do not fit at once, so that samples which finish make room for others."""

    num_engines: tuple[int, ...] = (16, 64, 256, 1024)
    groups_per_engine: int = 4
    samples_per_group: int = 8
    samples_per_engine: int = 16
    engines_per_group: int = 4  # where groups are split

    def num_samples(self, num_engines: int) -> int:
        return num_engines * self.groups_per_engine * self.samples_per_group

    def groups(self, num_engines: int, split: bool) -> tuple[int, int]:
        """Return the number of groups, and of each group's samples."""
        num_groups = max(1, num_engines // self.engines_per_group) if split else num_engines * self.groups_per_engine
        return num_groups, self.num_samples(num_engines) // num_groups


class ReadyCalls(FakeCalls):
    """Gives samples that were made before, and trusts the list of calls that is waited for."""

    def ready(self, calls: list[Call], timeout_s: float) -> Sequence[Call]:
        return list(islice(self._ready, self._num_at_once))


@dataclass
class Side:
    """Holds one generation to time: ``prepare`` makes its groups and samples, ``run`` gives the samples out.

    ``wait`` says how many calls a wait finds: one (ONE_AT_A_TIME), or as many as there are engines (TOGETHER).
    ``whose``: the coordinator's, also with SHARING, or the FAKES' alone with nothing between.
    """

    sizes: CoordinatorSizes
    num_engines: int
    wait: str
    whose: str = OURS
    requests: list[GroupRequest] = field(default_factory=list)
    calls: ReadyCalls = field(init=False)

    @property
    def is_coordinated(self) -> bool:
        return self.whose != FAKES

    def prepare(self) -> None:
        num_groups, num_samples = self.sizes.groups(self.num_engines, split=self.whose == SHARING)
        seeds, params = tuple(range(num_samples)), SamplingParams(max_new_tokens=4)
        self.requests = [GroupRequest(str(number), (1, 2, 3), seeds, params) for number in range(num_groups)]
        made = {request.group_id: _samples(request) for request in self.requests}

        def make(request: GroupRequest, engine: int, version: int) -> Iterator[GeneratedSample]:
            samples = made[request.group_id]
            return (samples[index] for index in request.sample_indices)

        at_once = 1 if self.wait == ONE_AT_A_TIME else self.num_engines
        self.calls = ReadyCalls(self.num_engines, at_once, make_generation=make)
        gc.collect()  # not of another side's garbage while this one is timed

    def run(self, turn: int) -> int:
        """Return how many samples came."""
        if not self.is_coordinated:
            return self._run_fakes()
        shares = self.whose == SHARING
        coordinator = Coordinator(self.calls, self.num_engines, self.sizes.samples_per_engine, shares_replies=shares)
        return sum(1 for _ in coordinator.generate(self.requests))

    def _run_fakes(self) -> int:
        numbers = count()
        for request in self.requests:
            number = next(numbers)
            self.calls.generate(number % self.num_engines, request, number)
        came = 0
        while ready := self.calls.ready([], 0.0):
            for stream in ready:
                came += self.calls.next_sample(stream) is not None
        return came


def _samples(request: GroupRequest) -> list[GeneratedSample]:
    num_prompt_tokens = len(request.prompt_token_ids)
    return [
        GeneratedSample(request.group_id, index, (5, 6), (-1.0, -2.0), "stop", 0, num_prompt_tokens)
        for index in range(len(request.seeds))
    ]


def measure(options: BenchOptions) -> list[Row]:
    return measure_coordinator(CoordinatorSizes(), options.num_rounds)


def measure_coordinator(sizes: CoordinatorSizes, num_rounds: int) -> list[Row]:
    """Time all sides in turn; rows hold medians, and name the CPU time of every round."""
    sides = {
        f"{whose}.{wait}.{num}": Side(sizes, num, wait, whose)
        for whose in (OURS, SHARING, FAKES)
        for wait in (ONE_AT_A_TIME, TOGETHER)
        for num in sizes.num_engines
    }
    runs: Mapping[str, Callable[[int], int]] = {name: side.run for name, side in sides.items()}
    before = {name: side.prepare for name, side in sides.items()}
    times = interleaved("coordinator", num_rounds, runs, before=before)
    for name, side in sides.items():
        assert all(each.result == sizes.num_samples(side.num_engines) for each in times[name]), "a sample was lost"
    rows = [_row(name, side, times[name]) for name, side in sides.items()]
    return rows + [_growth(wait, sizes, times) for wait in (ONE_AT_A_TIME, TOGETHER)]


def _row(name: str, side: Side, times: Sequence[Timed[int]]) -> Row:
    all_us = [1e6 * each.cpu_s / each.result for each in times]
    whose = {OURS: "", SHARING: "groups are split and share replies, ", FAKES: "the fakes alone, "}[side.whose]
    rounds = " ".join(f"{us:.1f}" for us in all_us)
    what = f"{side.num_engines} engines, {whose}a wait finds {side.wait}: CPU a sample; rounds {rounds}"
    id, us = f"coordinator.{name}", statistics.median(all_us)
    if side.is_coordinated and side.num_engines == max(side.sizes.num_engines):
        return at_most(id, what, us, "us", MOST_US)
    return Row(id, what, us, "us")


def _growth(wait: str, sizes: CoordinatorSizes, times: Mapping[str, Sequence[Timed[int]]]) -> Row:
    """Return how CPU time, less the fakes', grows with a generation's samples, of which every engine has as many."""

    def median_cpu_s(whose: str, num_engines: int) -> float:
        return statistics.median(each.cpu_s for each in times[f"{whose}.{wait}.{num_engines}"])

    seconds = [median_cpu_s(OURS, num) - median_cpu_s(FAKES, num) for num in sizes.num_engines]
    exponent = growth_exponent([sizes.num_samples(num) for num in sizes.num_engines], seconds)
    what = f"CPU less the fakes' grows as a generation's samples, and engines, to this power; a wait finds {wait}"
    return at_most(f"coordinator.growth.{wait}", what, exponent, "power", MOST_GROWTH)


def growth_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the slope of log(seconds) over log(size) by least squares: 1.0 is linear, 2.0 quadratic."""
    x, y = [math.log(size) for size in sizes], [math.log(each) for each in seconds]
    return statistics.linear_regression(x, y).slope


def prepare(options: BenchOptions) -> None:
    """See Benchmark; nothing can be missing."""


def add_flags(parser: ArgumentParser) -> None:
    """See Benchmark; there are no others."""


COORDINATOR = Benchmark(
    what="The driver's Python a sample for 16 to 1,024 engines, which are fakes: nothing else is needed.",
    parts=PARTS,
    prepare=prepare,
    add_flags=add_flags,
)
