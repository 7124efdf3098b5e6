"""A fuzzer makes hostile inputs by seed and tries each on the product; what becomes of the inputs is counted here.

A module of a kind of inputs holds its fuzzer and the ``measure`` of its part of the benchmark::

    class Rows:
        def __init__(self, folder: Path) -> None: ...            # prepares what all inputs share, in an empty folder

        def make(self, random: Random) -> Case[str]:             # the same input for the same random numbers
            return Case("a row whose label is half of a surrogate pair", r'{"prompt": "a", "label": "\\ud800"}')

        def attempt(self, case: Case[str]) -> bool:              # a ConfigError is a refusal as well
            return len(prompts_of(case.value)) > 0

        def close(self) -> None: ...

    measure = Kind("rows", "lines of jsonl files", 5_000, Rows).measure
"""

from __future__ import annotations

import json
import math
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import takewhile
from pathlib import Path
from random import Random
from time import monotonic
from typing import Generic, Protocol, TypeVar

from rich.console import Console
from rich.progress import track

from slime_spec.bench.rows import BenchOptions, Row, at_most
from slime_spec.errors import ConfigError

MAX_SHOWN = 5  # failures that a report describes, of each outcome
Value = TypeVar("Value")


class Outcome(StrEnum):
    """An input is accepted or refused; every other outcome is a fault of the product."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    TRACEBACK = "tracebacks"
    HANG = "hangs"
    NAN = "nan"


FAULTS = (Outcome.TRACEBACK, Outcome.HANG, Outcome.NAN)


@dataclass(frozen=True)
class Case(Generic[Value]):
    """Holds an input and a description from which a reader knows it: ``Case("config.json: vocab_size is -1", ...)``."""

    what: str
    value: Value


class Fuzzer(Protocol[Value]):
    """Makes and tries inputs of one kind, one at a time."""

    def make(self, random: Random) -> Case[Value]:
        """Make the input that these random numbers stand for; anything random comes from them."""

    def attempt(self, case: Case[Value]) -> bool:
        """Return whether the product accepts the input; False, or a ConfigError, where it refuses the input in words.

        Raises Hang or NanAnswer for such an answer; every other exception is a traceback that a user would see.
        """

    def close(self) -> None: ...


class Hang(BaseException):
    """An input was not answered in time; no handler of the product catches this."""


class NanAnswer(Exception):
    """An answer, or an accepted input, holds a number that is NaN or infinite."""


@dataclass(frozen=True)
class Failure:
    """Describes an input that failed: ``Failure(17, Outcome.TRACEBACK, "--lr '1_0'", "KeyError: 'x' (build.py:12)")``.

    ``seed`` alone makes the input again: ``slime-spec bench robustness --kind KIND --seed 17 --count 1``.
    """

    seed: int
    outcome: Outcome
    what: str
    error: str


@dataclass(frozen=True)
class Counts:
    """Counts what became of inputs, with every input that failed."""

    accepted: int
    refused: int
    failures: tuple[Failure, ...]

    @property
    def tried(self) -> int:
        return self.accepted + self.refused + len(self.failures)

    def of(self, fault: Outcome) -> list[Failure]:
        return [each for each in self.failures if each.outcome is fault]


@dataclass(frozen=True)
class Kind(Generic[Value]):
    """Describes one kind of inputs: the name, what they are, how many by default, the fuzzer, the time for each."""

    name: str
    what: str
    count: int
    open: Callable[[Path], Fuzzer[Value]]
    limit_s: float = 20.0

    def measure(self, options: BenchOptions) -> list[Row]:
        """Try inputs as the options say (number, first seed, seconds in all), and report the counts as rows."""
        return self.rows(self.tried(options.count or self.count, options.seeds[0], options.seconds))

    def tried(self, count: int, first_seed: int = 0, seconds: float | None = None) -> Counts:
        """Try ``count`` inputs, or those that ``seconds`` leave time for, from ``first_seed`` on."""
        ended = math.inf if seconds is None else monotonic() + seconds
        accepted = refused = 0
        failures: list[Failure] = []
        with tempfile.TemporaryDirectory() as folder, closing(self.open(Path(folder))) as fuzzer:
            in_time = takewhile(lambda _: monotonic() < ended, range(first_seed, first_seed + count))
            console = Console(stderr=True)
            for seed in track(in_time, self.name, count, console=console, transient=True):
                found = self._tried_one(fuzzer, seed)
                accepted += found is Outcome.ACCEPTED
                refused += found is Outcome.REFUSED
                if isinstance(found, Failure):
                    failures.append(found)
                    text = f"seed {seed}: {found.what}: {found.error}"
                    console.print(text.encode(errors="backslashreplace").decode(), markup=False, highlight=False)
        return Counts(accepted, refused, tuple(failures))

    def _tried_one(self, fuzzer: Fuzzer[Value], seed: int) -> Outcome | Failure:
        case = fuzzer.make(Random(f"{self.name} {seed}"))
        try:
            with alarm(self.limit_s):
                return Outcome.ACCEPTED if fuzzer.attempt(case) else Outcome.REFUSED
        except ConfigError:
            return Outcome.REFUSED
        except Hang as error:
            return Failure(seed, Outcome.HANG, case.what, _where(error))
        except NanAnswer as error:
            return Failure(seed, Outcome.NAN, case.what, str(error))
        except (Exception, SystemExit) as error:  # noqa: BLE001  (whatever a user would see as a traceback)
            return Failure(seed, Outcome.TRACEBACK, case.what, _where(error))

    def rows(self, counts: Counts) -> list[Row]:
        outcomes = {Outcome.ACCEPTED: counts.accepted, Outcome.REFUSED: counts.refused}
        prefix = f"robustness.{self.name}"
        return [
            Row(f"{prefix}.tried", self.what, counts.tried, "inputs"),
            *(Row(f"{prefix}.{name}", f"of these {name}", number, "inputs") for name, number in outcomes.items()),
            *(self._fault_row(fault, counts.of(fault)) for fault in FAULTS),
        ]

    def _fault_row(self, fault: Outcome, failures: list[Failure]) -> Row:
        shown = "; ".join(f"seed {each.seed}: {each.what}: {each.error}" for each in failures[:MAX_SHOWN])
        return at_most(f"robustness.{self.name}.{fault}", shown or f"{fault}", len(failures), "inputs", 0)


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise Hang within the block once ``seconds`` have passed; in the main thread only. An outer alarm goes on."""

    def ring(*_: object) -> None:
        raise Hang(f"no answer in {seconds:g} s")

    started = monotonic()
    before = signal.signal(signal.SIGALRM, ring)
    outer_s, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer_s:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, outer_s - (monotonic() - started)))


def finite_json(text: str) -> object:
    """Return the value of a JSON answer; raises NanAnswer where it holds NaN or an infinite number."""

    def refuse(constant: str) -> None:
        raise NanAnswer(f"the answer holds {constant}: {text[:200]}")

    return json.loads(text, parse_constant=refuse)


def _where(error: BaseException) -> str:
    """Return an exception as one line, with the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name})" if frames else ""
    return f"{type(error).__name__}: {str(error)[:200]}{place}"
