"""Compare prompt lookup with plain decoding: its gain where replies copy the prompt, its cost elsewhere.

    accept length      reply tokens over verify rounds (SGLang's formula: the prefill's token counts)
    break-even length  time of a verify round over time of a plain decode step: the tokens a round must yield

Speculation pays where the accept length exceeds the break-even length.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rollout.embedded.engine import EmbeddedEngine
from slime_spec.algorithms import LOOKUP
from slime_spec.bench.local_engine import engine_config, greedy, started_engine
from slime_spec.bench.prompts import KINDS, Prompts, tokenized
from slime_spec.bench.rows import BenchOptions, Row, at_least
from slime_spec.bench.timing import Timed, interleaved, median_ratio, median_s
from slime_spec.types import GeneratedSample

Samples = list[GeneratedSample]


@dataclass(frozen=True)
class SpeculationSizes:
    """Holds the sizes that are measured."""

    num_new_tokens: int = 64
    num_rounds: int = 5
    batch_sizes: tuple[int, ...] = (1, 4, 8)


def measure(options: BenchOptions) -> list[Row]:
    prompts = {kind: tokenized(options.model, kind) for kind in KINDS}
    return measure_speculation(options.model, prompts, SpeculationSizes(options.num_new_tokens, options.num_rounds))


def measure_speculation(model: Path, prompts: dict[str, Prompts], sizes: SpeculationSizes) -> list[Row]:
    """Measure each kind of prompt and batch size, fp32, greedy."""
    rows: list[Row] = []
    with started_engine(engine_config(model, "float32", LOOKUP.name)) as engine:
        for kind, of_kind in prompts.items():
            for batch_size in sizes.batch_sizes:
                rows += _rows(f"{kind}.b{batch_size}", *_times(engine, kind, of_kind, batch_size, sizes))
    return rows


def _times(
    engine: EmbeddedEngine, kind: str, prompts: Prompts, batch_size: int, sizes: SpeculationSizes
) -> tuple[str, dict[str, list[Timed[Samples]]]]:
    """Return the measurement in words, and each side's rounds; "prefill" is the prompts' pass and the first token."""

    def side(num_new_tokens: int, speculative: bool) -> Callable[[int], Samples]:
        def of_round(turn: int) -> Samples:
            chosen = tuple(prompts[(turn + i) % len(prompts)] for i in range(batch_size))
            return greedy(engine, chosen, num_new_tokens, speculative)

        return of_round

    what = f"{kind} prompts, batch {batch_size}"
    sides = {
        "on": side(sizes.num_new_tokens, True),
        "off": side(sizes.num_new_tokens, False),
        "prefill": side(1, False),
    }
    return what, interleaved(f"speculation on and off, {what}", sizes.num_rounds, sides)


def _rows(name: str, what: str, times: dict[str, list[Timed[Samples]]]) -> list[Row]:
    on, off, prefill = times["on"], times["off"], times["prefill"]
    spec = [sample.spec for each in on for sample in each.result]
    num_rounds = sum(one.num_rounds for one in spec)
    num_tokens = sum(len(sample.token_ids) for each in on for sample in each.result)
    prefix = f"speculation.{name}"
    accept_length = num_tokens / num_rounds
    accept_rate = sum(one.num_correct for one in spec) / sum(one.num_proposed for one in spec)
    break_even = break_even_length(on, off, prefill)
    return [
        Row(f"{prefix}.tokens_per_s_on", f"{LOOKUP.name}, fp32, {what}", _per_s(on), "tokens/s"),
        Row(f"{prefix}.tokens_per_s_off", f"plain decoding, fp32, {what}", _per_s(off), "tokens/s"),
        Row(f"{prefix}.ratio", f"on over off, median of {len(on)} interleaved rounds", median_ratio(off, on), "x"),
        Row(f"{prefix}.accept_length", f"{what}: reply tokens over verify rounds", accept_length, "tokens/round"),
        Row(f"{prefix}.accept_rate", f"{what}: accepted drafts over proposed", accept_rate, "share"),
        Row(
            f"{prefix}.break_even_length",
            "time of a verify round over that of a plain step, prefill apart: pays above this accept length",
            break_even,
            "tokens/round",
        ),
        at_least(
            f"{prefix}.greedy_identical", "replies that speculation left unchanged", _unchanged(on, off), "share", 1
        ),
    ]


def _unchanged(on: Sequence[Timed[Samples]], off: Sequence[Timed[Samples]]) -> float:
    """Return the share of replies with the same tokens on both sides."""
    return statistics.fmean(
        a.token_ids == b.token_ids
        for with_spec, without in zip(on, off, strict=True)
        for a, b in zip(with_spec.result, without.result, strict=True)
    )


def break_even_length(
    on: Sequence[Timed[Samples]], off: Sequence[Timed[Samples]], prefill: Sequence[Timed[Samples]]
) -> float:
    """Return the time of a sequence's verify round over that of its plain decode step: the median over rounds.

    The first token comes from the prefill, so n tokens are n - 1 plain steps.
    """
    lengths = []
    for with_spec, without, first in zip(on, off, prefill, strict=True):
        num_rounds = sum(sample.spec.num_rounds for sample in with_spec.result)
        num_steps = sum(len(sample.token_ids) - 1 for sample in without.result)
        verify_s = (with_spec.seconds - first.seconds) / num_rounds
        step_s = (without.seconds - first.seconds) / num_steps
        lengths.append(verify_s / step_s)
    return statistics.median(lengths)


def _per_s(times: Sequence[Timed[Samples]]) -> float:
    return sum(len(sample.token_ids) for sample in times[0].result) / median_s(times)
