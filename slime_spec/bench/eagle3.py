"""Compare EAGLE-3 with the same engine's plain decoding, on held-out prompts of the main job's task.

Replies end where the model ends them, and are short. A decode ratio leaves out the target's prefill on both sides (the
draft's own prefill counts); a ratio counts all time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from slime_spec.bench.drafts import SHAPES, Shape, chosen_shapes, eagle3_config
from slime_spec.bench.local_engine import engine_config, started_engine
from slime_spec.bench.plain import SHORT
from slime_spec.bench.prompts import Prompts, in_domain, rotating
from slime_spec.bench.race import (
    Ask,
    EngineSide,
    PrefillSide,
    Side,
    Times,
    decode_per_s,
    decode_speed_up,
    maybe_at_least,
    race,
    ratio_rows,
    speed_rows,
)
from slime_spec.bench.rows import BenchOptions, Row, left_out_rows
from slime_spec.bench.timing import Budget, Time
from slime_spec.checkpoints.end_of_text import end_token_ids
from slime_spec.types import SamplingParams

# Bounds of greedy decode speed over the engine's own plain decoding, by batch size. A CPU's are by the clock and by CPU
# time, prefill left out; a GPU's are by the clock, with the prefill and without.
REACH = {1: 2.0, 4: 1.6, 8: 1.3}
GPU_REACH = {1: 2.5, 8: 2.0, 64: 1.4}
NUM_PROMPTS = 64
# Sampled replies can be long: they are cut where the main job cuts them, and measured in one dtype.
LONGEST_SAMPLED = 64
SAMPLED_SHAPE = Shape(3, 1, 4)
ON_CPU = "gumbel"
VERIFICATIONS = {
    "target_only": {},
    ON_CPU: {"use_gumbel_coupling": True},
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
    sizes = Eagle3Sizes(options.num_new_tokens, options.num_rounds, shapes=chosen_shapes(options))
    if options.num_gpus:
        sizes = replace(sizes, batch_sizes=tuple(GPU_REACH))
    if options.batch_sizes:
        sizes = replace(sizes, batch_sizes=options.batch_sizes, sampled_batch_sizes=options.batch_sizes)
    if options.dtypes:
        sizes = replace(sizes, dtypes=options.dtypes, sampled_dtypes=options.dtypes[:1])
    return measure_eagle3(options, in_domain(options.model, NUM_PROMPTS, options.seeds[0]), sizes)


def measure_eagle3(options: BenchOptions, prompts: Prompts, sizes: Eagle3Sizes) -> list[Row]:
    """Measure greedy replies in every shape, then sampled ones by every verification, per dtype and batch size."""
    rows: list[Row] = []
    left_out: list[str] = []
    budget = Budget(options.seconds)
    stops = tuple(end_token_ids(options.model))
    workload = Workload(prompts, stops, sizes.num_rounds, sizes.num_new_tokens, options.num_prompts)
    for dtype in sizes.dtypes:
        late: list[int] = []
        sides: dict[str, Side] = {}
        with ExitStack() as started:
            for batch_size in budget.within(sizes.batch_sizes, late):
                sides = sides or started.enter_context(greedy_sides(options, dtype, sizes.shapes))
                rows += _greedy_rows(workload, dtype, batch_size, sides, bool(options.num_gpus))
        left_out += [f"{SHORT[dtype]} greedy batch {batch_size}" for batch_size in late]
    workload = replace(workload, longest=min(sizes.num_new_tokens, LONGEST_SAMPLED))
    for dtype in sizes.sampled_dtypes:
        late = []
        sides = {}
        with ExitStack() as started:
            for batch_size in budget.within(sizes.sampled_batch_sizes, late):
                sides = sides or started.enter_context(sampled_sides(options, dtype))
                rows += _sampled_rows(workload, dtype, batch_size, sides)
        left_out += [f"{SHORT[dtype]} sampled batch {batch_size}" for batch_size in late]
    return [*rows, *left_out_rows("eagle3", left_out)]


@dataclass(frozen=True)
class Workload:
    """Holds the prompts, their stop tokens, the rounds, and the length of a reply; ``race`` gives them to all sides."""

    prompts: Prompts
    stop_token_ids: tuple[int, ...]
    num_rounds: int
    longest: int
    most_prompts: int = BenchOptions.num_prompts

    def race(self, where: str, batch_size: int, sides: Mapping[str, Side]) -> Times:
        # Several batches a round, whose replies end at different times.
        count = min(max(6, 2 * batch_size), max(self.most_prompts, batch_size))

        def ask(turn: int) -> Ask:
            chosen = rotating(self.prompts, turn * count, count)
            return Ask(chosen, batch_size, self.longest, self.stop_token_ids)

        everyone = {**sides, "prefill": PrefillSide(sides["plain"])}
        return race(f"EAGLE-3 and none, {where}", self.num_rounds, everyone, ask)


@contextmanager
def greedy_sides(options: BenchOptions, dtype: str, shapes: tuple[Shape, ...]) -> Iterator[dict[str, Side]]:
    """Return plain decoding, and one engine per shape."""
    with ExitStack() as started:
        config = engine_config(options.model, dtype, num_gpus=options.num_gpus or 0)
        plain = started.enter_context(started_engine(config))
        sides: dict[str, Side] = {"plain": EngineSide(plain, False)}
        for shape in shapes:
            engine = started.enter_context(started_engine(eagle3_config(options, dtype, shape), plain))
            sides[shape.name] = EngineSide(engine, True)
        yield sides


@contextmanager
def sampled_sides(options: BenchOptions, dtype: str) -> Iterator[dict[str, Side]]:
    """Return plain decoding at temperature 1, and one engine per way of verification."""
    with ExitStack() as started:
        config = engine_config(options.model, dtype, num_gpus=options.num_gpus or 0)
        plain = started.enter_context(started_engine(config))
        sides: dict[str, Side] = {"plain": EngineSide(plain, False, _at_temperature_1)}
        for name, settings in VERIFICATIONS.items():
            if name == ON_CPU and options.num_gpus:
                continue
            config = eagle3_config(options, dtype, SAMPLED_SHAPE, **settings)
            sides[name] = EngineSide(started.enter_context(started_engine(config, plain)), True, _at_temperature_1)
        yield sides


def _at_temperature_1(prompt: tuple[int, ...]) -> SamplingParams:
    return SamplingParams(temperature=1.0)


def _greedy_rows(workload: Workload, dtype: str, batch_size: int, sides: Mapping[str, Side], on_gpu: bool) -> list[Row]:
    where = f"{SHORT[dtype]}, batch {batch_size}, greedy"
    times = workload.race(where, batch_size, sides)
    prefix = f"eagle3.{SHORT[dtype]}.b{batch_size}"
    rows = _speeds(prefix, where, times)
    shapes = [name for name in times if name not in ("plain", "prefill")]
    best = max(shapes, key=lambda name: _decode(times, name, "seconds" if on_gpu else "cpu_s"))
    words = f"EAGLE-3 {best}, the best of {len(shapes)} shapes, over plain decoding, {where}"
    return rows + best_rows(f"{prefix}.best", words, times, best, batch_size, on_gpu)


def best_rows(prefix: str, words: str, times: Times, best: str, batch_size: int, on_gpu: bool) -> list[Row]:
    """Return the speed of side ``best`` over that of side "plain", each with and without side "prefill"."""
    by_clock = (GPU_REACH if on_gpu else REACH).get(batch_size)
    rows = []
    bounds: tuple[tuple[str, Time, str, float | None], ...] = (
        ("decode_ratio", "seconds", "by the clock", by_clock),
        ("decode_cpu_ratio", "cpu_s", "per CPU second", None if on_gpu else by_clock),
    )
    for suffix, time, by, bound in bounds:
        value = _decode(times, best, time)
        rows.append(maybe_at_least(f"{prefix}.{suffix}", f"{words}, prefill apart, {by}", value, bound))
    with_prefill, by_cpu = ratio_rows(prefix, f"{words}, prefill included", times["plain"], times[best])
    if on_gpu:
        with_prefill = maybe_at_least(with_prefill.id, with_prefill.what, with_prefill.value, by_clock)
    return [*rows, with_prefill, by_cpu]


def _sampled_rows(workload: Workload, dtype: str, batch_size: int, sides: Mapping[str, Side]) -> list[Row]:
    where = f"{SHORT[dtype]}, batch {batch_size}, temperature 1, {SAMPLED_SHAPE.name}"
    times = workload.race(where, batch_size, sides)
    prefix = f"eagle3.{SHORT[dtype]}.b{batch_size}.sampled"
    rows = _speeds(prefix, where, times)
    for name in (each for each in VERIFICATIONS if each in times):
        text = f"{name} over plain decoding, {where}, prefill apart"
        by_clock, by_cpu = _decode(times, name, "seconds"), _decode(times, name, "cpu_s")
        rows.append(Row(f"{prefix}.{name}.decode_ratio", f"{text}, by the clock", by_clock, "x"))
        rows.append(Row(f"{prefix}.{name}.decode_cpu_ratio", f"{text}, per CPU second", by_cpu, "x"))
    return rows


def _speeds(prefix: str, where: str, times: Times) -> list[Row]:
    rows = []
    for name in (each for each in times if each != "prefill"):
        rows += speed_rows(f"{prefix}.{name}", f"{name}, {where}", times[name])
        decoded = decode_per_s(times[name], times["prefill"], "seconds")
        rows.append(Row(f"{prefix}.{name}.decode_tokens_per_s", f"{name}, {where}, prefill apart", decoded, "tokens/s"))
    return rows


def _decode(times: Times, name: str, time: Time) -> float:
    return decode_speed_up(times["plain"], times[name], times["prefill"], time)
