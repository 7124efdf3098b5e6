"""Measure what the device does at most: every other figure is held against its copy bandwidth and matmul rate."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slime_spec.bench.local_engine import device_of
from slime_spec.bench.rows import BenchOptions, Row
from slime_spec.bench.timing import interleaved, median_s


@dataclass(frozen=True)
class CeilingSizes:
    """Holds the bytes of a copy, the width of the square matrices, and the timed rounds."""

    copy_bytes: int
    matmul_width: int
    num_rounds: int


def sizes_on(device: torch.device, num_rounds: int) -> CeilingSizes:
    return CeilingSizes(2**32, 8192, num_rounds) if device.type == "cuda" else CeilingSizes(2**24, 256, num_rounds)


def measure(options: BenchOptions) -> list[Row]:
    device = device_of(options.num_gpus)
    return measure_ceilings(device, sizes_on(device, options.num_rounds))


def measure_ceilings(device: torch.device, sizes: CeilingSizes) -> list[Row]:
    """Measure the copy of a buffer, and the product of two bf16 matrices."""
    copied = f"{sizes.copy_bytes / 1e6:.0f} MB copied on the device, bytes read and written"
    width = sizes.matmul_width
    return [
        Row("device.copy", copied, copy_bytes_per_s(device, sizes) / 1e12, "TB/s"),
        Row(
            "device.matmul.bf16",
            f"product of two {width} x {width} matrices",
            matmul_flops(device, sizes) / 1e12,
            "TFLOP/s",
        ),
    ]


def copy_bytes_per_s(device: torch.device, sizes: CeilingSizes) -> float:
    """Return the bytes read and written per second by a copy on the device, the median over rounds."""
    source = torch.ones(sizes.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = interleaved("copies", sizes.num_rounds, {"copy": lambda turn: target.copy_(source)})
    return 2 * sizes.copy_bytes / median_s(times["copy"])


def matmul_flops(device: torch.device, sizes: CeilingSizes) -> float:
    """Return the floating point operations per second of a product in bf16, the median over rounds."""
    width = sizes.matmul_width
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(width, width, generator=generator, device=device).bfloat16() for _ in range(2))
    times = interleaved("matrix products", sizes.num_rounds, {"matmul": lambda turn: a @ b})
    return 2 * width**3 / median_s(times["matmul"])
