"""Compare EAGLE-3 with the same engine's plain decoding, on held-out prompts of the main job's task.

Replies end where the model ends them, and are short. A decode ratio leaves out the target's prefill on both sides (the
draft's own prefill counts); a ratio counts all time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from slime_spec.bench.drafts import SHAPES, Shape, eagle3_config
from slime_spec.bench.local_engine import engine_config, started_engine
from slime_spec.bench.plain import SHORT
from slime_spec.bench.prompts import Prompts, in_domain, rotating
from slime_spec.bench.race import (
    Ask,
    EngineSide,
    PrefillSide,
    Side,
    Times,
    decode_speed_up,
    maybe_at_least,
    race,
    ratio_rows,
    speed_rows,
)
from slime_spec.bench.rows import BenchOptions, Row
from slime_spec.checkpoints.end_of_text import end_token_ids
from slime_spec.types import SamplingParams

# Bounds of greedy decode speed over the engine's own plain decoding, by batch size.
REACH = {1: 2.0, 4: 1.6, 8: 1.3}
PROMPTS_AT_ONCE = {1: 6, 4: 8, 8: 16}
# Sampled replies can be long: they are cut where the main job cuts them, and measured in one dtype.
LONGEST_SAMPLED = 64
SAMPLED_SHAPE = Shape(3, 1, 4)
VERIFICATIONS = {
    "target_only": {},
    "rejection": {"use_rejection_sampling": True},
    "block": {"use_block_verification": True},
}


@dataclass(frozen=True)
class Eagle3Sizes:
    """Holds the sizes that are measured."""

    num_new_tokens: int = 128
    num_rounds: int = 5
    batch_sizes: tuple[int, ...] = (1, 4, 8)
    sampled_batch_sizes: tuple[int, ...] = (1, 8)
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    sampled_dtypes: tuple[str, ...] = ("bfloat16",)
    shapes: tuple[Shape, ...] = SHAPES


def measure(options: BenchOptions) -> list[Row]:
    prompts = in_domain(options.model, 4 * max(PROMPTS_AT_ONCE.values()), options.seeds[0])
    return measure_eagle3(options, prompts, Eagle3Sizes(options.num_new_tokens, options.num_rounds))


def measure_eagle3(options: BenchOptions, prompts: Prompts, sizes: Eagle3Sizes) -> list[Row]:
    """Measure greedy replies in every shape, then sampled ones by every verification, per dtype and batch size."""
    rows: list[Row] = []
    stops = tuple(end_token_ids(options.model))
    workload = Workload(prompts, stops, sizes.num_rounds, sizes.num_new_tokens)
    for dtype in sizes.dtypes:
        with greedy_sides(options, dtype, sizes.shapes) as sides:
            for batch_size in sizes.batch_sizes:
                rows += _greedy_rows(workload, dtype, batch_size, sides)
    workload = replace(workload, longest=min(sizes.num_new_tokens, LONGEST_SAMPLED))
    for dtype in sizes.sampled_dtypes:
        with sampled_sides(options, dtype) as sides:
            for batch_size in sizes.sampled_batch_sizes:
                rows += _sampled_rows(workload, dtype, batch_size, sides)
    return rows


@dataclass(frozen=True)
class Workload:
    """Holds the prompts, their stop tokens, the rounds, and the length of a reply; ``race`` gives them to all sides."""

    prompts: Prompts
    stop_token_ids: tuple[int, ...]
    num_rounds: int
    longest: int

    def race(self, where: str, batch_size: int, sides: Mapping[str, Side]) -> Times:
        count = PROMPTS_AT_ONCE[batch_size]

        def ask(turn: int) -> Ask:
            chosen = rotating(self.prompts, turn * count, count)
            return Ask(chosen, batch_size, self.longest, self.stop_token_ids)

        everyone = {**sides, "prefill": PrefillSide(sides["plain"])}
        return race(f"EAGLE-3 and none, {where}", self.num_rounds, everyone, ask)


@contextmanager
def greedy_sides(options: BenchOptions, dtype: str, shapes: tuple[Shape, ...]) -> Iterator[dict[str, Side]]:
    """Return plain decoding, and one engine per shape."""
    with ExitStack() as started:
        plain = started.enter_context(started_engine(engine_config(options.model, dtype)))
        sides: dict[str, Side] = {"plain": EngineSide(plain, False)}
        for shape in shapes:
            engine = started.enter_context(started_engine(eagle3_config(options, dtype, shape)))
            sides[shape.name] = EngineSide(engine, True)
        yield sides


@contextmanager
def sampled_sides(options: BenchOptions, dtype: str) -> Iterator[dict[str, Side]]:
    """Return plain decoding at temperature 1, and one engine per way of verification."""
    with ExitStack() as started:
        plain = started.enter_context(started_engine(engine_config(options.model, dtype)))
        sides: dict[str, Side] = {"plain": EngineSide(plain, False, _at_temperature_1)}
        for name, settings in VERIFICATIONS.items():
            config = eagle3_config(options, dtype, SAMPLED_SHAPE, **settings)
            sides[name] = EngineSide(started.enter_context(started_engine(config)), True, _at_temperature_1)
        yield sides


def _at_temperature_1(prompt: tuple[int, ...]) -> SamplingParams:
    return SamplingParams(temperature=1.0)


def _greedy_rows(workload: Workload, dtype: str, batch_size: int, sides: Mapping[str, Side]) -> list[Row]:
    where = f"{SHORT[dtype]}, batch {batch_size}, greedy"
    times = workload.race(where, batch_size, sides)
    prefix = f"eagle3.{SHORT[dtype]}.b{batch_size}"
    rows = _speeds(prefix, where, times)
    shapes = [name for name in times if name not in ("plain", "prefill")]
    best = max(shapes, key=lambda name: _decode(times, name, "cpu_s"))
    words = f"EAGLE-3 {best}, the best of {len(shapes)} shapes, over plain decoding, {where}"
    for suffix, time, by in (
        ("decode_ratio", "seconds", "by the clock"),
        ("decode_cpu_ratio", "cpu_s", "per CPU second"),
    ):
        value = _decode(times, best, time)
        text = f"{words}, prefill apart, {by}"
        rows.append(maybe_at_least(f"{prefix}.best.{suffix}", text, value, REACH.get(batch_size)))
    return [*rows, *ratio_rows(f"{prefix}.best", f"{words}, prefill included", times["plain"], times[best])]


def _sampled_rows(workload: Workload, dtype: str, batch_size: int, sides: Mapping[str, Side]) -> list[Row]:
    where = f"{SHORT[dtype]}, batch {batch_size}, temperature 1, {SAMPLED_SHAPE.name}"
    times = workload.race(where, batch_size, sides)
    prefix = f"eagle3.{SHORT[dtype]}.b{batch_size}.sampled"
    rows = _speeds(prefix, where, times)
    for name in VERIFICATIONS:
        text = f"{name} over plain decoding, {where}, prefill apart, per CPU second"
        rows.append(Row(f"{prefix}.{name}.decode_cpu_ratio", text, _decode(times, name, "cpu_s"), "x"))
    return rows


def _speeds(prefix: str, where: str, times: Times) -> list[Row]:
    names = [name for name in times if name != "prefill"]
    return [row for name in names for row in speed_rows(f"{prefix}.{name}", f"{name}, {where}", times[name])]


def _decode(times: Times, name: str, time: str) -> float:
    return decode_speed_up(times["plain"], times[name], times["prefill"], "cpu_s" if time == "cpu_s" else "seconds")
