"""Measure what a pass's time goes to: matrix products, the kernels between them, and gaps where nothing runs.

Products of few tokens are timed by themselves, too, by each of the ways between which the engine chooses.

The device is watched while one pass in captured graphs, logits included, runs by itself; on a CPU, operator by
operator. Watching lengthens the gaps, so the pass's time without it stands beside the shares.
"""

from __future__ import annotations

import importlib.util
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from rollout.embedded.cuda.graphs import CudaCapturer, Graphs
from rollout.embedded.linear import Packing
from rollout.embedded.mixed_blocks import plain
from rollout.embedded.model import Decoder
from rollout.embedded.plan import RowSpan
from rollout.embedded.target import Target
from slime_spec.bench.device.random_model import SHAPES, random_decoder, random_target
from slime_spec.bench.device.shapes import CPU_CONTEXT, CPU_SHAPES, GPU_CONTEXT, GPU_SHAPES
from slime_spec.bench.local_engine import device_of
from slime_spec.bench.plain import SHORT
from slime_spec.bench.rows import BenchOptions, Row
from slime_spec.bench.timing import interleaved, median_s, settled
from slime_spec.checkpoints.model_spec import ModelSpec

BATCH_SIZES = (1, 8)
# A product's kernel, of cuBLAS under its several names or of the engine, and on a CPU the operator.
PRODUCT = re.compile(r"gemm|gemv|nvjet|cutlass|splitk|multiply|aten::(mm|addmm|bmm|linear)", re.IGNORECASE)
OURS = re.compile(r"^(add_and_norm|silu_times|rotate_and_store|attend_split|merge_splits)")
KINDS = {
    "products": "matrix products",
    "kernels": "the engine's kernels between products",
    "other": "other kernels and copies",
    "gaps": "gaps: nothing runs",
}


@dataclass(frozen=True)
class Ran:
    """Holds what ran on the device, and when, in microseconds of one clock."""

    name: str
    start: float
    end: float


def measure(options: BenchOptions) -> list[Row]:
    """Measure every shape in turn, in bf16 on a GPU and in fp32 on a CPU."""
    device, rows = device_of(options.num_gpus), []
    for name in options.shapes or (GPU_SHAPES if options.num_gpus else CPU_SHAPES):
        rows += profile_shape(name, SHAPES[name], device, options.num_rounds, options.seeds[0])
    return rows


def profile_shape(name: str, spec: ModelSpec, device: torch.device, num_rounds: int, seed: int = 0) -> list[Row]:
    """Measure passes over one token of each of BATCH_SIZES sequences."""
    on_gpu = device.type == "cuda"
    dtype, context = (torch.bfloat16, GPU_CONTEXT) if on_gpu else (torch.float32, CPU_CONTEXT)
    # A CPU's own kernels run all blocks in one call, which would be one event.
    decoder = random_decoder(spec, dtype, device, context + 1, seed, Packing.PLAIN)
    rows = []
    for batch_size in BATCH_SIZES:
        target = random_target(decoder, device, batch_size, context + 1, Graphs(CudaCapturer()) if on_gpu else None)
        run = one_pass(target, batch_size, context)
        words = f"{name}, random {SHORT[str(dtype).removeprefix('torch.')]} weights, batch {batch_size}"
        rows += _rows(f"device.{name}.profile.b{batch_size}", words, run, num_rounds)
    if importlib.util.find_spec("triton") is not None:
        rows += _product_rows(name, decoder, num_rounds)
    return rows


def _product_rows(name: str, decoder: Decoder, num_rounds: int) -> list[Row]:
    """Time the products of few tokens, with what lies around them, by each of the ways that the engine chooses from."""
    from rollout.embedded.cuda import products  # needs Triton

    rows, on_gpu = [], decoder.device.type == "cuda"
    for tokens, stage in product((1, products.MOST_TOKENS) if on_gpu else (1,), products.Stage):
        runs = products.stage_runs(plain(decoder.layers), stage, tokens, decoder.spec.rms_norm_eps)
        words = f"{name}, {tokens} tokens, {stage.value} with what lies around it, a block"
        timers = {way: products.replays(run) if on_gpu else run for way, run in runs.items()}
        sides = {str(number): partial(_in_turn, timer) for number, timer in enumerate(timers.values())}
        times = interleaved(words, num_rounds, sides)
        for way, each in zip(runs, times.values(), strict=True):
            by = f"tile{way.tile.rows}x{way.tile.columns}" if isinstance(way, products.KernelProducts) else "library"
            us = 1e6 * median_s(each) / len(decoder.layers)
            rows.append(Row(f"device.{name}.product.k{tokens}.{stage.value}.{by}", f"{words}: by {by}", us, "us"))
    return rows


def _in_turn(run: Callable[[], object], turn: int) -> object:
    return run()


def one_pass(target: Target, batch_size: int, context: int) -> Callable[[], object]:
    """Return what runs a pass over one token of each sequence after ``context``, with logits."""
    has_room = target.cache.reserve((batch_size, context + 1), (0, 0))
    assert has_room, "the cache holds the pass"
    spans = [RowSpan(row, context, 1) for row in range(batch_size)]
    return lambda: target.logits(target.run(target.cache.own, spans, [7] * batch_size).hidden)


def _rows(prefix: str, words: str, run: Callable[[], object], num_rounds: int) -> list[Row]:
    times = interleaved(f"passes of {words}", num_rounds, {"pass": lambda turn: run()})
    rounds = [times_by_kind(watched(run)) for _ in range(num_rounds)]
    rows = [Row(f"{prefix}.pass", f"{words}: a pass, not watched", 1000 * median_s(times["pass"]), "ms")]
    for kind, what in KINDS.items():
        median_us = statistics.median(each[kind] for each in rounds)
        share = statistics.median(each[kind] / sum(each.values()) for each in rounds)
        rows.append(Row(f"{prefix}.{kind}", f"{words}, a watched pass: {what}", median_us / 1000, "ms"))
        rows.append(Row(f"{prefix}.{kind}_share", f"{words}: share of a watched pass: {what}", share, "share"))
    return rows


def watched(run: Callable[[], object]) -> list[Ran]:
    """Return what ran on the device during a run."""
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    settled()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        run()
        settled()
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    found: Iterable[FunctionEvent] = profiled.events()
    return [
        Ran(each.name, each.time_range.start, each.time_range.end)
        for each in found
        if each.device_type == kind and each.cpu_parent is None  # a GPU's kernels have none
    ]


def times_by_kind(ran: Iterable[Ran]) -> dict[str, float]:
    """Return the microseconds of each of KINDS from the first start to the last end.

    What runs beside something that began earlier counts from that one's end on, so that all kinds add up.
    """
    times = dict.fromkeys(KINDS, 0.0)
    in_order = sorted(ran, key=lambda each: each.start)
    assert in_order, "a pass runs something"
    reached = in_order[0].start
    for each in in_order:
        times["gaps"] += max(each.start - reached, 0.0)
        times[kind_of(each.name)] += max(each.end - max(each.start, reached), 0.0)
        reached = max(reached, each.end)
    return times


def kind_of(name: str) -> str:
    """Return which of KINDS a kernel is. Example: ``kind_of("nvjet_tst_64x8_64x16_4x1_v_bz_TNT") == "products"``"""
    if OURS.match(name):
        return "kernels"
    return "products" if PRODUCT.search(name) else "other"
