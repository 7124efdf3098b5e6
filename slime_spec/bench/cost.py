"""Measure passes and the work around them, fit the cost model, and find batch sizes where speculation loses.

Passes are timed at the core, without the engine's thread. A time is a minimum over interleaved rounds: noise only adds.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter

import torch

from rollout.embedded.plan import RowSpan
from rollout.embedded.target import Target
from slime_spec.bench.chart import Series, write_chart
from slime_spec.bench.cost_model import CostModel, Pass, fit
from slime_spec.bench.device.random_model import SHAPES
from slime_spec.bench.draft_cost import SHARE_BATCH_SIZE, DraftCost, DraftSizes, measure_draft
from slime_spec.bench.drafts import CHAINS, chosen_shapes
from slime_spec.bench.local_engine import engine_config
from slime_spec.bench.memory_probe import Held
from slime_spec.bench.plain import SHORT
from slime_spec.bench.prompts import Prompts, in_domain
from slime_spec.bench.random_engine import assembly_of, random_engine, random_prompts
from slime_spec.bench.rows import BenchOptions, Row, at_most
from slime_spec.bench.timing import Time, Timed, interleaved
from slime_spec.run_folder import SOURCE

MB = 1_000_000
OUTSIDE_REACH, MEMORY_SLACK_BYTES = 0.15, 300 * MB
# Bounds of the time of a pass over 4 tokens of every sequence over that of a pass over 1, by batch size.
VERIFY_REACH: Mapping[int, float | None] = {1: 1.2}
GPU_VERIFY_REACH: Mapping[int, float | None] = {8: 1.15}
PROBE_TOKENS = 2048
NUM_PROMPTS = 32
# The largest batch size of the chart and of the search for losing batch sizes.
LARGEST_BATCH = 32
GUESSED_LENGTHS = (1.5, 2.0, 3.0)


@dataclass(frozen=True)
class CostSizes:
    """Holds the sizes that are measured; ``context`` is the number of tokens that every sequence has cached."""

    num_rounds: int = 15
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    num_tokens: tuple[int, ...] = (1, 2, 4, 8)
    context: int = 256
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    draft: DraftSizes = field(default_factory=DraftSizes)


def measure(options: BenchOptions) -> list[Row]:
    sizes = CostSizes(num_rounds=5 * options.num_rounds, dtypes=options.dtypes or CostSizes.dtypes)
    if options.batch_sizes:
        draft = replace(sizes.draft, batch_sizes=options.batch_sizes)
        sizes = replace(sizes, batch_sizes=options.batch_sizes, draft=draft)
    if chains := tuple(shape for shape in chosen_shapes(options) if shape in CHAINS):
        sizes = replace(sizes, draft=replace(sizes.draft, shapes=chains))
    if options.model_shape is None:
        return measure_cost(options, in_domain(options.model, NUM_PROMPTS, options.seeds[0]), sizes)
    prompts = random_prompts(SHAPES[options.model_shape], NUM_PROMPTS, options.seeds[0])
    with random_engine(options, torch.bfloat16) as named:
        return measure_cost(named, prompts, sizes)


def measure_cost(options: BenchOptions, prompts: Prompts, sizes: CostSizes) -> list[Row]:
    """Measure per dtype: verify pass over plain pass, time around passes, memory, fitted model; one chart for all."""
    rows: list[Row] = []
    lines: list[Series] = []
    num_gpus = options.num_gpus or 0
    reach, times = (GPU_VERIFY_REACH, (BY_CLOCK,)) if num_gpus else (VERIFY_REACH, (BY_CLOCK, BY_CPU))
    is_bounded = not num_gpus and options.model_shape is None  # bounds of a CPU are the main job's model's
    if not num_gpus and not is_bounded:
        reach = dict.fromkeys(reach)
    for dtype in sizes.dtypes:
        prefix, words = _named(options.model_shape, dtype)
        timed_passes = time_passes(options, dtype, sizes)
        rows += pass_rows(f"{prefix}.pass", words, timed_passes)
        rows += verify_rows(prefix, words, timed_passes, reach, times)
        drafted = measure_draft(options, dtype, prompts, sizes.draft)
        rows += _outside_rows(prefix, words, drafted, is_bounded)
        model = fit(_minima(timed_passes), drafted.drafts, drafted.outside, drafted.plain_outside)
        rows += model_rows(prefix, words, model, drafted, sizes.batch_sizes)
        lines += _series(dtype, model, drafted)
        if is_bounded:
            rows.append(_memory_row(options.model, dtype))
    if options.chart is not None:
        write_chart(options.chart, "EAGLE-3 chains over plain decoding, from the cost model", lines)
    return rows


Passes = dict[str, list[Timed[None]]]


def _named(shape: str | None, dtype: str) -> tuple[str, str]:
    """Return the prefix of an engine's rows, and the engine in words."""
    short = SHORT[dtype]
    return (f"cost.{short}", short) if shape is None else (f"cost.{shape}.{short}", f"{shape}, random {short} weights")


def time_passes(options: BenchOptions, dtype: str, sizes: CostSizes) -> Passes:
    """Time passes of every (batch size, tokens per sequence), named "B,k", at ``context`` cached tokens."""
    config = engine_config(options.model, dtype, num_gpus=options.num_gpus or 0)
    core = assembly_of(options)(config).core(0, perf_counter)
    return time_target(f"passes, {dtype}", core.target, sizes)


def time_target(what: str, target: Target, sizes: CostSizes) -> Passes:
    """See ``time_passes``; of ``sizes`` those of the target's passes count."""
    largest, widest = max(sizes.batch_sizes), max(sizes.num_tokens)
    has_room = target.cache.reserve((largest, sizes.context + widest), (0, 0))
    assert has_room, "the cache holds the passes"
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, target.decoder.spec.vocab_size, (sizes.context,), generator=generator).tolist()
    for row in range(largest):
        target.run(target.cache.own, [RowSpan(row, 0, sizes.context)], tokens)
    sides = {f"{b},{k}": _PassSide(target, b, k, sizes.context) for b in sizes.batch_sizes for k in sizes.num_tokens}
    return interleaved(what, sizes.num_rounds, sides)


class _PassSide:
    """Runs one pass over the next tokens of every sequence, with logits; the cache is left unchanged."""

    def __init__(self, target: Target, batch_size: int, num_tokens: int, context: int) -> None:
        self._target = target
        self._spans = [RowSpan(row, context, num_tokens) for row in range(batch_size)]
        self._tokens = [(7 * i) % target.decoder.spec.vocab_size for i in range(batch_size * num_tokens)]

    def __call__(self, turn: int) -> None:
        target = self._target
        target.logits(target.run(target.cache.own, self._spans, self._tokens).hidden)


def _minima(passes: Passes) -> list[Pass]:
    cells = [(name.split(","), min(each.seconds for each in times)) for name, times in passes.items()]
    return [Pass(int(batch_size), int(num_tokens), seconds) for (batch_size, num_tokens), seconds in cells]


def pass_rows(prefix: str, model: str, passes: Passes) -> list[Row]:
    """Return the time of every pass, ``{prefix}.b8.k4``, of a model given in words."""
    rows = []
    for each in _minima(passes):
        what = f"{model}: a pass over {each.num_tokens} tokens of each of {each.batch_size} sequences"
        rows.append(Row(f"{prefix}.b{each.batch_size}.k{each.num_tokens}", what, 1000 * each.seconds, "ms"))
    return rows


BY_CLOCK: tuple[Time, str] = ("seconds", "ratio")
BY_CPU: tuple[Time, str] = ("cpu_s", "cpu_ratio")  # says nothing where a GPU computes


def verify_rows(
    prefix: str, model: str, passes: Passes, reach: Mapping[int, float | None], times: Sequence[tuple[Time, str]]
) -> list[Row]:
    """Return the time of a pass over 4 tokens over that of one over 1, for every measured batch size of ``reach``."""
    rows = []
    for batch_size, bound in reach.items():
        if not {f"{batch_size},1", f"{batch_size},4"} <= passes.keys():
            continue
        one, four = passes[f"{batch_size},1"], passes[f"{batch_size},4"]
        for time, suffix in times:
            ratio = statistics.median(getattr(b, time) / getattr(a, time) for a, b in zip(one, four, strict=True))
            what = f"{model}, batch {batch_size}: a pass over 4 tokens over one over 1, {len(one)} interleaved rounds"
            id = f"{prefix}.b{batch_size}.verify4.{suffix}"
            rows.append(Row(id, what, ratio, "x") if bound is None else at_most(id, what, ratio, "x", bound))
    return rows


def _outside_rows(prefix: str, words: str, drafted: DraftCost, is_bounded: bool) -> list[Row]:
    rows = []
    for name, share in drafted.outside_shares.items():
        id = f"{prefix}.outside.b{SHARE_BATCH_SIZE}.{name}"
        what = f"{words}, batch {SHARE_BATCH_SIZE}, {name}: share of a round's time outside target and draft"
        rows.append(at_most(id, what, share, "share", OUTSIDE_REACH) if is_bounded else Row(id, what, share, "share"))
    return rows


def model_rows(engine: str, short: str, model: CostModel, drafted: DraftCost, batch_sizes: Sequence[int]) -> list[Row]:
    """Return the coefficients, the errors of the fits, and the prediction for every measured chain."""
    prefix = f"{engine}.model"
    terms = (
        ("weights", "t_verify(B, k): whatever B and k", model.weights),
        ("sequence", "t_verify(B, k): per sequence", model.sequence),
        ("token", "t_verify(B, k): per token of a sequence", model.token),
        ("draft", "t_draft(B, S): per step", model.draft_step.fixed),
        ("draft_sequence", "t_draft(B, S): per step and sequence", model.draft_step.each),
        ("outside", "around a round's passes: per round", model.outside.fixed),
        ("outside_sequence", "around a round's passes: per sequence", model.outside.each),
        ("plain_outside", "around a plain step: per step", model.plain_outside.fixed),
        ("plain_outside_sequence", "around a plain step: per sequence", model.plain_outside.each),
    )
    rows = [Row(f"{prefix}.{name}", f"{short}, {what}", 1000 * value, "ms") for name, what, value in terms]
    for name, value in (("verify", model.verify_error), ("draft", model.draft_error)):
        rows.append(Row(f"{prefix}.{name}_error", f"{short}: largest relative error of the fit", value, "share"))
    for num_steps, accept_length in drafted.accept_lengths.items():
        measured = f"chains of {num_steps} drafts, in domain, greedy"
        if accept_length is not None:
            what = f"{short}: tokens a round gains, {measured}"
            rows.append(Row(f"{prefix}.s{num_steps}.accept_length", what, accept_length, "tokens/round"))
        for batch_size in batch_sizes:
            id, where = f"{prefix}.s{num_steps}.b{batch_size}", f"{short}, batch {batch_size}"
            length = model.break_even_length(batch_size, num_steps)
            what = f"{where}: tokens a round must gain with {num_steps} drafts"
            rows.append(Row(f"{id}.break_even", what, length, "tokens/round"))
            if accept_length is not None:
                what, gain = f"{where}: predicted over plain decoding, {measured}", accept_length
                rows.append(Row(f"{id}.predicted", what, model.speed_up(batch_size, num_steps, gain), "x"))
        lengths = {f"at{length:g}": length for length in GUESSED_LENGTHS}
        if accept_length is not None:
            lengths = {"measured": accept_length, **lengths}
        for name, length in lengths.items():
            if length <= num_steps + 1:
                id = f"{prefix}.s{num_steps}.loses_from.{name}"
                rows.append(
                    _losing_row(id, short, model.loses_from(num_steps, length, LARGEST_BATCH), num_steps, length)
                )
    return rows


def _losing_row(id: str, short: str, size: int | None, num_steps: int, length: float) -> Row:
    what = f"{short}: {num_steps} drafts that gain {length:.2f} tokens a round are slower than none from this batch on"
    if size is None:
        return Row(id, f"{what}: not up to {LARGEST_BATCH}", float("nan"), "")
    return Row(id, what, size, "sequences")


def _series(dtype: str, model: CostModel, drafted: DraftCost) -> list[Series]:
    lines = []
    for num_steps, length in drafted.accept_lengths.items():
        if length is None:
            continue
        points = tuple((size, model.speed_up(size, num_steps, length)) for size in _powers(LARGEST_BATCH))
        lines.append(Series(f"{SHORT[dtype]}, {num_steps} drafts, {length:.2f} a round", points, dtype == "float32"))
    return lines


def _powers(largest: int) -> list[int]:
    return [2**i for i in range(largest.bit_length())]


def _memory_row(model: Path, dtype: str) -> Row:
    """Return the memory that an engine holds in its own process beyond one copy of its weights and a full KV cache."""
    command = [
        sys.executable,
        "-m",
        "slime_spec.bench.memory_probe",
        str(model.absolute()),
        dtype,
        str(PROBE_TOKENS),
    ]
    done = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True, check=True)
    held = Held(**json.loads(done.stdout.splitlines()[-1]))
    what = (
        f"{SHORT[dtype]}: memory of a fresh process with an engine, beside weights once ({held.weights / MB:.0f} MB) "
        f"and the full KV cache ({held.kv_bound / MB:.0f} MB); {held.before / MB:.0f} MB of it before the engine"
    )
    beside = (held.process - held.weights - held.kv_bound) / MB
    return at_most(f"cost.{SHORT[dtype]}.memory_beside", what, beside, "MB", MEMORY_SLACK_BYTES / MB)
