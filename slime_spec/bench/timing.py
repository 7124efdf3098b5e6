"""Time alternatives in turn in one process, so that a disturbance of the machine meets all of them.

Work on a GPU is queued and done later; a time here ends when it is done.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter, process_time
from typing import Generic, Literal, TypeVar

import torch
from rich.console import Console
from rich.progress import track

Result = TypeVar("Result")
Clock = Callable[[], float]
Time = Literal["seconds", "cpu_s"]


@dataclass(frozen=True)
class Timed(Generic[Result]):
    """Holds one call's time, its CPU time (all threads), and its result."""

    seconds: float
    result: Result
    cpu_s: float = 0.0


def settled() -> float:
    """Return seconds by ``perf_counter`` once the GPU that this process uses, if any, has done what was queued."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return perf_counter()


def timed(call: Callable[[], Result], clock: Clock = settled, cpu_clock: Clock = process_time) -> Timed[Result]:
    start, cpu_start = clock(), cpu_clock()
    result = call()
    return Timed(clock() - start, result, cpu_clock() - cpu_start)


def interleaved(
    what: str,
    num_rounds: int,
    sides: Mapping[str, Callable[[int], Result]],
    clock: Clock = settled,
    cpu_clocks: Mapping[str, Clock] | None = None,
    before: Mapping[str, Callable[[], None]] | None = None,
) -> dict[str, list[Timed[Result]]]:
    """Call every side once per round, A B, B A, A B, ...; each side gets the number of the round.

    A warm-up round comes first and is left out of the result (it has the number of the first timed round). A side that
    works in another process has its own clock in ``cpu_clocks``; the function in ``before`` runs first, untimed.
    """
    times: dict[str, list[Timed[Result]]] = {name: [] for name in sides}
    for turn in told(what, num_rounds + 1):
        order = list(sides) if turn % 2 else list(sides)[::-1]
        round_number = max(turn - 1, 0)
        for name in order:
            if before is not None and name in before:
                before[name]()
            one = timed(partial(sides[name], round_number), clock, (cpu_clocks or {}).get(name, process_time))
            if turn:
                times[name].append(one)
    return times


def told(what: str, num_rounds: int) -> Iterator[int]:
    """Count rounds on a terminal's bar, and elsewhere line by line: a log that was cut says how far it came."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(range(num_rounds), what, console=console, transient=True)
        return
    for turn in range(num_rounds):
        tell(f"{what}: round {turn} of {num_rounds - 1}" if turn else f"{what}: warm-up")
        yield turn


def tell(text: str) -> None:
    """Write a line about a measurement's progress to stderr."""
    Console(stderr=True, soft_wrap=True).print(text, markup=False, highlight=False)


class Budget:
    """Says when a part of a benchmark shall begin nothing more; without seconds it never does."""

    def __init__(self, seconds: float | None, clock: Clock = perf_counter) -> None:
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds

    def within(self, items: Iterable[Result], left_out: list[Result]) -> Iterator[Result]:
        """Yield items while there is time; the others go into ``left_out``."""
        for item in items:
            if self._end is not None and self._clock() >= self._end:
                left_out.append(item)
            else:
                yield item


def median_s(times: Sequence[Timed[Result]]) -> float:
    return statistics.median(each.seconds for each in times)


def median_ratio(slower: Sequence[Timed[Result]], faster: Sequence[Timed[Result]]) -> float:
    """Return the median over rounds of one side's seconds over the other's: a round cancels the machine's drift."""
    return statistics.median(a.seconds / b.seconds for a, b in zip(slower, faster, strict=True))
