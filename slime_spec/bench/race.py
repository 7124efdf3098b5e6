"""A race gives the same prompts to engines in turn: this engine, Hugging Face's generate, peers as processes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from time import process_time
from types import TracebackType
from typing import Protocol

from rollout.embedded.engine import EmbeddedEngine
from slime_spec.bench.local_engine import started_engine
from slime_spec.bench.prompts import Prompts
from slime_spec.bench.rows import Row, at_least
from slime_spec.bench.timing import Time, Timed, interleaved
from slime_spec.config.tree import Config
from slime_spec.interfaces import RolloutEngine
from slime_spec.types import GroupRequest, SamplingParams


@dataclass(frozen=True)
class Ask:
    """Describes a round's work, the same for every side: a greedy reply per prompt, ``batch_size`` prompts at once.

    A reply ends after ``num_new_tokens``, or earlier at one of ``stop_token_ids`` (which it then contains).
    """

    prompts: Prompts
    batch_size: int
    num_new_tokens: int
    stop_token_ids: tuple[int, ...] = ()

    @property
    def batches(self) -> list[Prompts]:
        starts = range(0, len(self.prompts), self.batch_size)
        return [self.prompts[start : start + self.batch_size] for start in starts]


@dataclass(frozen=True)
class Answer:
    """Holds replies in prompts' order; ``num_passes`` are target passes after the prefill, summed over sequences."""

    token_ids: list[tuple[int, ...]]
    num_passes: int | None = None

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))


class Side(Protocol):
    """Answers the rounds of a race with one engine."""

    def answer(self, ask: Ask) -> Answer: ...

    def cpu_s(self) -> float:
        """Return the CPU seconds that the side's process has used so far."""


GREEDY = SamplingParams(temperature=0.0)


class EngineSide:
    """Implements Side with an embedded engine of this process, with or without speculation.

    ``params_of`` gives a prompt's sampling parameters except the length; every request has a seed of its own.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        speculative: bool,
        params_of: Callable[[tuple[int, ...]], SamplingParams] = lambda prompt: GREEDY,
    ) -> None:
        self._engine, self._speculative, self._params_of = engine, speculative, params_of
        self._next_seed = 0

    def answer(self, ask: Ask) -> Answer:
        samples = []
        for batch in ask.batches:
            groups = [self._engine.generate(self._request(prompt, ask)) for prompt in batch]
            samples += [sample for group in groups for sample in group]
        num_passes = sum(each.spec.num_rounds if self._speculative else len(each.token_ids) - 1 for each in samples)
        return Answer([each.token_ids for each in samples], num_passes)

    def cpu_s(self) -> float:
        return process_time()

    def _request(self, prompt: tuple[int, ...], ask: Ask) -> GroupRequest:
        self._next_seed += 1
        params = replace(
            self._params_of(prompt),
            max_new_tokens=ask.num_new_tokens,
            stop_token_ids=ask.stop_token_ids,
            ignore_eos=not ask.stop_token_ids,
            speculative=self._speculative,
        )
        return GroupRequest(str(self._next_seed), prompt, (self._next_seed,), params)


class ForgetfulSide:
    """Implements Side with an engine that restarts before every round, so that n-grams of the last round are gone.

    It computes with the target's weights of ``first``, which it is measured against.
    """

    def __init__(self, config: Config, first: EmbeddedEngine | None = None) -> None:
        self._config, self._first, self._running = config, first, ExitStack()

    def __enter__(self) -> ForgetfulSide:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._running.close()

    def renew(self) -> None:
        """Restart the engine; to be called before every round."""
        self._running.close()
        self._side = EngineSide(
            self._running.enter_context(started_engine(self._config, self._first)), speculative=True
        )

    def answer(self, ask: Ask) -> Answer:
        return self._side.answer(ask)

    def cpu_s(self) -> float:
        return process_time()


class PrefillSide:
    """Measures another side's time to the first tokens, so that decoding can be timed without it."""

    def __init__(self, side: Side) -> None:
        self._side = side

    def answer(self, ask: Ask) -> Answer:
        return self._side.answer(replace(ask, num_new_tokens=1))

    def cpu_s(self) -> float:
        return self._side.cpu_s()


Times = dict[str, list[Timed[Answer]]]


def race(
    what: str,
    num_rounds: int,
    sides: Mapping[str, Side],
    ask: Callable[[int], Ask],
    before: Mapping[str, Callable[[], None]] | None = None,
) -> Times:
    """Let every side answer ``ask(round)`` in turn; see ``interleaved``."""

    def answering(side: Side) -> Callable[[int], Answer]:
        return lambda turn: side.answer(ask(turn))

    calls = {name: answering(side) for name, side in sides.items()}
    clocks = {name: side.cpu_s for name, side in sides.items()}
    return interleaved(what, num_rounds, calls, cpu_clocks=clocks, before=before)


def per_s(times: Sequence[Timed[Answer]], time: Time) -> float:
    """Return tokens per second (or per CPU second), the median over rounds."""
    return statistics.median(each.result.num_tokens / getattr(each, time) for each in times)


def speed_up(slower: Sequence[Timed[Answer]], faster: Sequence[Timed[Answer]], time: Time) -> float:
    """Return one side's tokens per second over the other's: the median over rounds cancels the machine's drift."""
    return statistics.median(
        (b.result.num_tokens * getattr(a, time)) / (a.result.num_tokens * getattr(b, time))
        for a, b in zip(slower, faster, strict=True)
    )


def decode_speed_up(
    slower: Sequence[Timed[Answer]],
    faster: Sequence[Timed[Answer]],
    prefill: Sequence[Timed[Answer]],
    time: Time,
) -> float:
    """Return ``speed_up`` of the tokens after the first, with ``prefill``'s time taken off both sides."""
    return statistics.median(
        _decode_rate(b, first, time) / _decode_rate(a, first, time)
        for a, b, first in zip(slower, faster, prefill, strict=True)
    )


def decode_per_s(times: Sequence[Timed[Answer]], prefill: Sequence[Timed[Answer]], time: Time) -> float:
    """Return tokens after the first per second (or per CPU second) beside the prefill, the median over rounds."""
    return statistics.median(_decode_rate(each, first, time) for each, first in zip(times, prefill, strict=True))


def _decode_rate(each: Timed[Answer], first: Timed[Answer], time: Time) -> float:
    num_tokens = each.result.num_tokens - len(each.result.token_ids)
    return num_tokens / float(getattr(each, time) - getattr(first, time))


def tokens_per_pass(times: Sequence[Timed[Answer]]) -> float | None:
    """Return tokens per sequence and target pass after the prefill; None where the side does not count passes."""
    answers = [each.result for each in times]
    counts = [each.num_passes for each in answers]
    if None in counts or not sum(filter(None, counts)):
        return None
    return sum(each.num_tokens - len(each.token_ids) for each in answers) / sum(filter(None, counts))


def speed_rows(prefix: str, what: str, times: Sequence[Timed[Answer]]) -> list[Row]:
    """Return both speeds of one side, and its tokens per target pass where they are known and not 1."""
    rows = [
        Row(f"{prefix}.tokens_per_s", what, per_s(times, "seconds"), "tokens/s"),
        Row(f"{prefix}.tokens_per_cpu_s", what, per_s(times, "cpu_s"), "tokens/CPU-s"),
    ]
    per_pass = tokens_per_pass(times)
    if per_pass is not None and per_pass != 1.0:
        rows.append(Row(f"{prefix}.tokens_per_pass", f"{what}: the prefill's token apart", per_pass, "tokens/pass"))
    return rows


def ratio_rows(
    prefix: str, what: str, slower: Sequence[Timed[Answer]], faster: Sequence[Timed[Answer]], bound: float | None = None
) -> list[Row]:
    """Return the speed-up by the clock and by CPU time, each held to ``bound`` if there is a bound."""
    rounds = f"median of {len(slower)} interleaved rounds"
    by_clock, by_cpu = speed_up(slower, faster, "seconds"), speed_up(slower, faster, "cpu_s")
    return [
        maybe_at_least(f"{prefix}.ratio", f"{what}, by the clock, {rounds}", by_clock, bound),
        maybe_at_least(f"{prefix}.cpu_ratio", f"{what}, per CPU second, {rounds}", by_cpu, bound),
    ]


def maybe_at_least(id: str, what: str, value: float, bound: float | None) -> Row:
    return Row(id, what, value, "x") if bound is None else at_least(id, what, value, "x", bound)
