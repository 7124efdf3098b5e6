"""Measure a step of an EAGLE-3 draft with its weights in the engine's dtype, in int8 and in fp8 by blocks.

Weights are random. "products" are those of the block and the head one after the other, in a graph on a GPU; "chain" is
what the engine's drafter takes for a round's three drafts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from rollout.embedded.cuda.graphs import CudaCapturer
from rollout.embedded.drafters.network import DraftNetwork
from rollout.embedded.drafters.network_weights import NetworkBuilder
from rollout.embedded.linear import PackedLinear
from rollout.embedded.mixed_blocks import plain
from rollout.embedded.rope import RopeTable
from slime_spec.bench.device.ceilings import copy_bytes_per_s, sizes_on
from slime_spec.bench.device.random_model import SHAPES
from slime_spec.bench.draft_cost import GREEDY, DraftSizes, timed_runs
from slime_spec.bench.drafts import Shape, eagle3_config
from slime_spec.bench.local_engine import device_of
from slime_spec.bench.plain import SHORT
from slime_spec.bench.prompts import Prompts
from slime_spec.bench.random_engine import (
    RandomAssembly,
    random_draft,
    random_draft_spec,
    random_engine,
    random_prompts,
)
from slime_spec.bench.rows import BenchOptions, Row, at_most
from slime_spec.bench.timing import interleaved, median_s, settled, tell
from slime_spec.checkpoints.model_spec import ModelSpec

FORMS: tuple[str | None, ...] = (None, "int8", "fp8")
CHAIN = Shape(3, 1, 4)
FP32_ADDITION = 2.0**-23  # what an addition may lose of its size; tensor cores cut off where others round


@dataclass(frozen=True)
class DraftDtypeSizes:
    """Holds the engine's dtype, the sequences at once, the timed rounds, and the steps that one time is of."""

    dtype: str
    batch_sizes: tuple[int, ...]
    num_rounds: int
    num_steps: int


def measure(options: BenchOptions) -> list[Row]:
    """Measure every shape in turn, in bf16 on a GPU; in fp32 on a CPU, where an interpreter multiplies by fp8."""
    num_gpus = options.num_gpus or 0
    device, rows = device_of(num_gpus), []
    dtype, batch_sizes, num_steps = ("bfloat16", (1, 8, 64), 10) if num_gpus else ("float32", (1,), 1)
    sizes = DraftDtypeSizes(dtype, options.batch_sizes or batch_sizes, options.num_rounds, num_steps)
    copied = copy_bytes_per_s(device, sizes_on(device, options.num_rounds))
    for name in options.shapes or (("8b",) if num_gpus else ("tiny",)):
        rows += product_rows(f"device.draft.{name}", name, SHAPES[name], device, sizes, copied)
        with random_engine(replace(options, model_shape=name), getattr(torch, dtype)) as named:
            prompts = random_prompts(SHAPES[name], max(sizes.batch_sizes), options.seeds[0])
            rows += chain_rows(f"device.draft.{name}", name, named, prompts, sizes)
    return rows


def product_rows(
    prefix: str, name: str, target: ModelSpec, device: torch.device, sizes: DraftDtypeSizes, copied: float
) -> list[Row]:
    """Return a step's products by batch size and form; ``copied`` is the device's copy bandwidth, bytes/s."""
    linears = {form: _linears(target, form, device, getattr(torch, sizes.dtype)) for form in FORMS}
    num_weights = sum(each.num_outputs * each.num_inputs for each in linears[None])
    rows = []
    for batch_size in sizes.batch_sizes:
        sides = {_named(form, sizes): _products(linears[form], device, batch_size, sizes.num_steps) for form in FORMS}
        times = interleaved(f"a draft's products, {name}, batch {batch_size}", sizes.num_rounds, sides)
        plain = _named(None, sizes)
        for form in FORMS:
            short = _named(form, sizes)
            id, words = f"{prefix}.{short}.products.b{batch_size}", f"{name}, weights in {short}, batch {batch_size}"
            if form == "fp8" and device.type == "cpu":
                words += " (by Triton's interpreter, whose time says nothing)"
            seconds = median_s(times[short]) / sizes.num_steps
            rows.append(Row(id, f"{words}: the products of a draft's step", 1000 * seconds, "ms"))
            itemsize = 1 if form else getattr(torch, sizes.dtype).itemsize
            what = f"{words}: reading the weights once at the copy's bandwidth, over a step's products"
            rows.append(Row(f"{id}.bandwidth_share", what, num_weights * itemsize / copied / seconds, "share"))
            if form:
                ratio = median_s(times[plain]) / median_s(times[short])
                rows.append(Row(f"{id}.ratio", f"{words}: {plain} over {short}, products", ratio, "x"))
        what = f"{name}, batch {batch_size}: largest error of a product in fp8, in those that sums of fp32 may have"
        error = sum_error(linears["fp8"][1], device, batch_size)
        rows.append(at_most(f"{prefix}.fp8.error.b{batch_size}", what, error, "share", 1.0))
    return rows


@torch.inference_mode()
def sum_error(linear: PackedLinear, device: torch.device, batch_size: int) -> float:
    """Return the largest error of products in fp32, over what their sums may be off by in any order: at most 1."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(batch_size, linear.num_inputs, generator=generator, device=device).to(linear.dtype)
    weight, wide = linear.unpacked().double(), x.double()
    allowed = linear.num_inputs * FP32_ADDITION * (wide.abs() @ weight.abs().T)
    return float(((linear.wide(x).double() - wide @ weight.T).abs() / allowed).max())


def _named(form: str | None, sizes: DraftDtypeSizes) -> str:
    return form or SHORT[sizes.dtype]


def _linears(target: ModelSpec, form: str | None, device: torch.device, dtype: torch.dtype) -> list[PackedLinear]:
    """Return the matrices that every step of a chain multiplies by, the head last."""
    spec = random_draft_spec(target)
    builder = NetworkBuilder(spec, RopeTable(spec.block, 1, dtype, device), dtype, device, form)
    network = builder.build(dict(random_draft(spec, dtype, device, seed=0)))
    assert isinstance(network, DraftNetwork), "the draft drafts by steps"
    assert network.head is not None, "the draft has a head of its own"
    (layer,) = plain(network.layers)
    return [layer.qkv, layer.out, layer.gate_up, layer.down, network.head]


def _products(
    linears: list[PackedLinear], device: torch.device, batch_size: int, num_steps: int
) -> Callable[[int], None]:
    """Return what multiplies by every matrix ``num_steps`` times, captured on a GPU."""
    inputs = [torch.ones(batch_size, each.num_inputs, dtype=each.dtype, device=device) for each in linears]

    @torch.inference_mode()
    def run() -> list[torch.Tensor]:
        for _ in range(num_steps):
            results = [each(x) for each, x in zip(linears[:-1], inputs[:-1], strict=True)]
            results.append(linears[-1].wide(inputs[-1]))
        return results

    captured = CudaCapturer().capture(run) if device.type == "cuda" else None

    def products(turn: int) -> None:
        if captured is None:
            run()
        else:
            captured.replay()

    return products


def chain_rows(
    prefix: str, name: str, options: BenchOptions, prompts: Prompts, sizes: DraftDtypeSizes
) -> Iterator[Row]:
    """Yield what drafting takes of a round, by form and batch size; an engine on a CPU has no draft in fp8."""
    for form in FORMS:
        short = _named(form, sizes)
        if form == "fp8" and not options.num_gpus:
            yield Row(f"{prefix}.{short}.chain", f"{name}: an engine on a CPU has no draft in fp8", math.nan, "")
            continue
        tell(f"chains of a draft in {short}, {name}")
        core = RandomAssembly(eagle3_config(options, sizes.dtype, CHAIN, draft_model_quantization=form)).core(
            0, settled
        )
        for batch_size in sizes.batch_sizes:
            runs = timed_runs(core, prompts, batch_size, DraftSizes(num_repeats=sizes.num_rounds), GREEDY)
            what = f"{name}, weights in {short}, batch {batch_size}: drafting of a round, {CHAIN.num_steps} drafts"
            fastest_s = min(run.draft_s for run in runs)
            yield Row(f"{prefix}.{short}.chain.b{batch_size}", what, 1000 * fastest_s, "ms")
