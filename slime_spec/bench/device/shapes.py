"""Measure T(B, k), the time of a pass over k tokens of each of B sequences, for models of known shapes.

Weights are random: a pass takes the same time. "eager" passes launch every operator by itself; "graphs" are what the
engine runs on a GPU.
"""

from __future__ import annotations

import torch

from rollout.embedded.cuda.graphs import CudaCapturer, Graphs
from rollout.embedded.target import Target
from slime_spec.bench.cost import BY_CLOCK, GPU_VERIFY_REACH, CostSizes, pass_rows, time_target, verify_rows
from slime_spec.bench.device.ceilings import copy_bytes_per_s, sizes_on
from slime_spec.bench.device.random_model import (
    SHAPES,
    num_read_weights,
    num_weights,
    random_decoder,
    random_target,
)
from slime_spec.bench.local_engine import device_of
from slime_spec.bench.plain import SHORT
from slime_spec.bench.rows import BenchOptions, Row, at_least
from slime_spec.checkpoints.model_spec import ModelSpec

GB = 1e9
GPU_SHAPES, CPU_SHAPES = ("135m", "1b", "8b"), ("tiny",)
GPU_BATCH_SIZES, CPU_BATCH_SIZES = (1, 8, 64, 256), (1, 8)
GPU_CONTEXT, CPU_CONTEXT = 256, 32
# Bounds of decoding one sequence over what reading the weights once takes, by shape, on a GPU.
BANDWIDTH_REACH = {"8b": 0.8}


def measure(options: BenchOptions) -> list[Row]:
    """Measure every shape in turn, in bf16 on a GPU and in fp32 on a CPU."""
    num_gpus = options.num_gpus or 0
    device = device_of(num_gpus)
    sizes = CostSizes(
        num_rounds=options.num_rounds,
        batch_sizes=options.batch_sizes or (GPU_BATCH_SIZES if num_gpus else CPU_BATCH_SIZES),
        context=GPU_CONTEXT if num_gpus else CPU_CONTEXT,
        dtypes=("bfloat16" if num_gpus else "float32",),
    )
    copied = copy_bytes_per_s(device, sizes_on(device, options.num_rounds))
    rows = []
    for name in options.shapes or (GPU_SHAPES if num_gpus else CPU_SHAPES):
        rows += measure_shape(name, SHAPES[name], device, sizes, copied, options.seeds[0])
    return rows


def measure_shape(
    name: str, spec: ModelSpec, device: torch.device, sizes: CostSizes, copied: float, seed: int = 0
) -> list[Row]:
    """Measure one shape in the first dtype of ``sizes``; ``copied`` is the device's copy bandwidth, bytes/s.

    The model's memory is free again afterwards.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    short, dtype = SHORT[sizes.dtypes[0]], getattr(torch, sizes.dtypes[0])
    num_positions = sizes.context + max(sizes.num_tokens)
    decoder = random_decoder(spec, dtype, device, num_positions, seed)
    words = f"{name}, random {short} weights, {sizes.context} cached tokens"
    rows = [Row(f"device.{name}.weights", f"{words}: weights", num_weights(spec) * dtype.itemsize / GB, "GB")]
    read_s = num_read_weights(spec) * dtype.itemsize / copied
    ways = {"eager": None, "graphs": Graphs(CudaCapturer())} if on_gpu else {"eager": None}
    for way, graphs in ways.items():
        target = random_target(decoder, device, max(sizes.batch_sizes), num_positions, graphs)
        rows += _way_rows(f"device.{name}.{way}", f"{words}, {way}", target, sizes, read_s, on_gpu)
    if on_gpu:
        peak = torch.cuda.max_memory_allocated(device) / GB
        rows.append(Row(f"device.{name}.memory_peak", f"{words}: most memory of tensors at once", peak, "GB"))
    return rows


def _way_rows(prefix: str, words: str, target: Target, sizes: CostSizes, read_s: float, on_gpu: bool) -> list[Row]:
    """Measure passes of one way of running them; ``read_s`` is what reading the weights once takes."""
    passes = time_target(f"passes of {words}", target, sizes)
    rows = pass_rows(prefix, words, passes)
    reach = GPU_VERIFY_REACH if on_gpu else dict.fromkeys(GPU_VERIFY_REACH)
    rows += verify_rows(prefix, words, passes, reach, (BY_CLOCK,))
    if "1,1" in passes:
        share = read_s / min(each.seconds for each in passes["1,1"])
        what = f"{words}: reading the weights once at the copy's bandwidth, over decoding one token of one sequence"
        bound = BANDWIDTH_REACH.get(prefix.split(".")[1]) if on_gpu else None
        id = f"{prefix}.b1.k1.bandwidth_share"
        rows.append(Row(id, what, share, "share") if bound is None else at_least(id, what, share, "share", bound))
    return rows
