"""Measure passes and the work around them, fit the cost model, and find batch sizes where speculation loses.

Passes are timed at the core, without the engine's thread. A time is a minimum over interleaved rounds: noise only adds.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import torch

from rollout.embedded.assemble import Assembly
from rollout.embedded.core import GenerationCore
from rollout.embedded.plan import RowSpan
from slime_spec.bench.chart import Series, write_chart
from slime_spec.bench.cost_model import CostModel, Pass, fit
from slime_spec.bench.draft_cost import SHARE_BATCH_SIZE, DraftCost, DraftSizes, measure_draft
from slime_spec.bench.local_engine import engine_config
from slime_spec.bench.memory_probe import Held
from slime_spec.bench.plain import SHORT
from slime_spec.bench.prompts import Prompts, in_domain
from slime_spec.bench.rows import BenchOptions, Row, at_most
from slime_spec.bench.timing import Timed, interleaved
from slime_spec.run_folder import SOURCE

MB = 1_000_000
VERIFY_REACH, OUTSIDE_REACH, MEMORY_SLACK_BYTES = 1.2, 0.15, 300 * MB
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
    sizes = CostSizes(num_rounds=5 * options.num_rounds)
    return measure_cost(options, in_domain(options.model, NUM_PROMPTS, options.seeds[0]), sizes)


def measure_cost(options: BenchOptions, prompts: Prompts, sizes: CostSizes) -> list[Row]:
    """Measure per dtype: verify pass over plain pass, time around passes, memory, fitted model; one chart for all."""
    rows: list[Row] = []
    lines: list[Series] = []
    for dtype in sizes.dtypes:
        timed_passes = time_passes(options.model, dtype, sizes)
        rows += _verify_rows(dtype, timed_passes)
        drafted = measure_draft(options, dtype, prompts, sizes.draft)
        rows += _outside_rows(dtype, drafted)
        model = fit(_minima(timed_passes), drafted.drafts, drafted.outside, drafted.plain_outside)
        rows += model_rows(dtype, model, drafted, sizes.batch_sizes)
        lines += _series(dtype, model, drafted)
        rows.append(_memory_row(options.model, dtype))
    if options.chart is not None:
        write_chart(options.chart, "EAGLE-3 chains over plain decoding, from the cost model", lines)
    return rows


Passes = dict[str, list[Timed[None]]]


def time_passes(model: Path, dtype: str, sizes: CostSizes) -> Passes:
    """Time passes of every (batch size, tokens per sequence), named "B,k", at ``context`` cached tokens."""
    core = Assembly(engine_config(model, dtype)).core(0, perf_counter)
    largest, widest = max(sizes.batch_sizes), max(sizes.num_tokens)
    core.cache.reserve((largest, sizes.context + widest), (0, 0))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, core.decoder.spec.vocab_size, (sizes.context,), generator=generator).tolist()
    for row in range(largest):
        core.target.run(core.cache.own, [RowSpan(row, 0, sizes.context)], tokens)
    sides = {f"{b},{k}": _PassSide(core, b, k, sizes.context) for b in sizes.batch_sizes for k in sizes.num_tokens}
    return interleaved(f"passes, {dtype}", sizes.num_rounds, sides)


class _PassSide:
    """Runs one pass over the next tokens of every sequence, with logits; the cache is left unchanged."""

    def __init__(self, core: GenerationCore, batch_size: int, num_tokens: int, context: int) -> None:
        self._core = core
        self._spans = [RowSpan(row, context, num_tokens) for row in range(batch_size)]
        self._tokens = [(7 * i) % core.decoder.spec.vocab_size for i in range(batch_size * num_tokens)]

    def __call__(self, turn: int) -> None:
        target = self._core.target
        target.logits(target.run(self._core.cache.own, self._spans, self._tokens).hidden)


def _minima(passes: Passes) -> list[Pass]:
    cells = [(name.split(","), min(each.seconds for each in times)) for name, times in passes.items()]
    return [Pass(int(batch_size), int(num_tokens), seconds) for (batch_size, num_tokens), seconds in cells]


def _verify_rows(dtype: str, passes: Passes) -> list[Row]:
    rows = []
    for each in _minima(passes):
        what = f"{SHORT[dtype]}: a pass over {each.num_tokens} tokens of each of {each.batch_size} sequences"
        id = f"cost.{SHORT[dtype]}.pass.b{each.batch_size}.k{each.num_tokens}"
        rows.append(Row(id, what, 1000 * each.seconds, "ms"))
    one, four = passes["1,1"], passes["1,4"]
    for suffix, time in (("ratio", "seconds"), ("cpu_ratio", "cpu_s")):
        ratio = statistics.median(getattr(b, time) / getattr(a, time) for a, b in zip(one, four, strict=True))
        what = f"{SHORT[dtype]}, batch 1: a pass over 4 tokens over a pass over 1, {len(one)} interleaved rounds"
        rows.append(at_most(f"cost.{SHORT[dtype]}.verify4.{suffix}", what, ratio, "x", VERIFY_REACH))
    return rows


def _outside_rows(dtype: str, drafted: DraftCost) -> list[Row]:
    return [
        at_most(
            f"cost.{SHORT[dtype]}.outside.b{SHARE_BATCH_SIZE}.{name}",
            f"{SHORT[dtype]}, batch {SHARE_BATCH_SIZE}, {name}: share of a round's time outside target and draft",
            share,
            "share",
            OUTSIDE_REACH,
        )
        for name, share in drafted.outside_shares.items()
    ]


def model_rows(dtype: str, model: CostModel, drafted: DraftCost, batch_sizes: Sequence[int]) -> list[Row]:
    """Return the coefficients, the errors of the fits, and the prediction for every measured chain."""
    prefix, short = f"cost.{SHORT[dtype]}.model", SHORT[dtype]
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
        what = f"{short}: tokens a round gains, {measured}"
        rows.append(Row(f"{prefix}.s{num_steps}.accept_length", what, accept_length, "tokens/round"))
        for batch_size in batch_sizes:
            id, where = f"{prefix}.s{num_steps}.b{batch_size}", f"{short}, batch {batch_size}"
            length = model.break_even_length(batch_size, num_steps)
            what = f"{where}: tokens a round must gain with {num_steps} drafts"
            rows.append(Row(f"{id}.break_even", what, length, "tokens/round"))
            speed_up = model.speed_up(batch_size, num_steps, accept_length)
            rows.append(Row(f"{id}.predicted", f"{where}: predicted over plain decoding, {measured}", speed_up, "x"))
        lengths = {"measured": accept_length, **{f"at{length:g}": length for length in GUESSED_LENGTHS}}
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
