"""The benchmark of the device has these parts and flags."""

from __future__ import annotations

import os
from argparse import ArgumentParser

from slime_spec.bench.device.random_model import SHAPES
from slime_spec.bench.local_engine import check_num_gpus
from slime_spec.bench.rows import Benchmark, BenchOptions
from slime_spec.interfaces import unknown_choice

HERE = "slime_spec.bench.device"
PARTS = {
    "ceilings": f"{HERE}.ceilings:measure",
    "shapes": f"{HERE}.shapes:measure",
    "profile": f"{HERE}.profile:measure",
    "attention": f"{HERE}.attention:measure",
    "draft_dtype": f"{HERE}.draft_dtype:measure",
    "trainer": f"{HERE}.trainer:measure",
    "ipc": f"{HERE}.ipc:measure",
    "push": f"{HERE}.push:measure",
}


def prepare(options: BenchOptions) -> None:
    """See Benchmark."""
    check_num_gpus(options.num_gpus)
    if not options.num_gpus:
        os.environ["TRITON_INTERPRET"] = "1"  # asked for when Triton is imported: the part attention runs a kernel
    for name in options.shapes:
        if name not in SHAPES:
            raise unknown_choice("--shapes", SHAPES, name)


def add_flags(parser: ArgumentParser) -> None:
    """See Benchmark."""
    parser.add_argument("--num-gpus", metavar="N", type=int, help="1: the GPU is measured (0: the CPU, in small sizes)")
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="NAME",
        help=f"of parts shapes, profile, draft_dtype: any of {', '.join(SHAPES)} (135m 1b 8b on a GPU, tiny on a CPU)",
    )
    parser.add_argument(
        "--batch-sizes",
        nargs="+",
        metavar="N",
        type=int,
        help="of parts shapes (1 8 64 256 on a GPU, 1 8 on a CPU) and draft_dtype (1 8 64, 1)",
    )
    parser.add_argument("--seconds", metavar="S", type=float, help="begin no case of part attention after these")


DEVICE = Benchmark(
    what="The device: copy and matmul, passes and training steps of random models, bytes and pushes between processes.",
    parts=PARTS,
    prepare=prepare,
    add_flags=add_flags,
    defaults=BenchOptions(num_rounds=10, num_gpus=0, batch_sizes=()),
)
