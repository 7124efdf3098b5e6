"""Timing alternatives against each other in one process, so that what disturbs one disturbs the other too."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Generic, TypeVar

from rich.console import Console
from rich.progress import track

Result = TypeVar("Result")


@dataclass(frozen=True)
class Timed(Generic[Result]):
    """One call: what it took and what it returned."""

    seconds: float
    result: Result


def timed(call: Callable[[], Result], clock: Callable[[], float] = perf_counter) -> Timed[Result]:
    start = clock()
    result = call()
    return Timed(clock() - start, result)


def interleaved(
    what: str,
    num_rounds: int,
    sides: Mapping[str, Callable[[int], Result]],
    clock: Callable[[], float] = perf_counter,
) -> dict[str, list[Timed[Result]]]:
    """Call every side once a round, A B, B A, A B, ...; each side gets the round's number.

    A warm-up round goes before and is not in the answer (it has the number of the first timed round).
    """
    times: dict[str, list[Timed[Result]]] = {name: [] for name in sides}
    for turn in track(range(num_rounds + 1), what, console=Console(stderr=True), transient=True):
        order = list(sides) if turn % 2 else list(sides)[::-1]
        round_number = max(turn - 1, 0)
        for name in order:
            one = timed(partial(sides[name], round_number), clock)
            if turn:
                times[name].append(one)
    return times


def median_s(times: Sequence[Timed[Result]]) -> float:
    return statistics.median(each.seconds for each in times)


def median_ratio(slower: Sequence[Timed[Result]], faster: Sequence[Timed[Result]]) -> float:
    """The median over rounds of one side's seconds over the other's: drift of the machine cancels within a round."""
    return statistics.median(a.seconds / b.seconds for a, b in zip(slower, faster, strict=True))
