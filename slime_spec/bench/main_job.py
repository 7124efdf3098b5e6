"""The benchmark of the main job measures every figure that has a bound."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from slime_spec.bench.learning import check_learning
from slime_spec.bench.rows import Benchmark, BenchOptions
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.launch.ray_environment import prepare_ray_environment

HERE = "slime_spec.bench"
PARTS = {
    "engine": f"{HERE}.engine:measure",
    "speculation": f"{HERE}.speculation:measure",
    "push": f"{HERE}.push:measure",
    "parity": f"{HERE}.parity:measure",
    "flat_groups": f"{HERE}.flat_groups:measure",
    "whole_step": f"{HERE}.whole_step:measure",
    "learning": f"{HERE}.learning:measure",
}
NEED_THE_MODEL = {"engine", "speculation", "push", "flat_groups", "whole_step"}
START_RAY = {"push", "parity"}


def prepare(options: BenchOptions) -> None:
    """See Benchmark."""
    if NEED_THE_MODEL & set(options.parts):
        ModelSpec.from_folder(options.model)
    if "learning" in options.parts:
        check_learning(options)
    if START_RAY & set(options.parts):
        prepare_ray_environment(joining=False)


def add_flags(parser: ArgumentParser) -> None:
    """See Benchmark."""
    parser.add_argument("--runs", nargs="+", type=Path, help="read these finished runs, start none")


MAIN_JOB = Benchmark(
    what="Engine speed and parity, speculation, weight push, trainer parity and time, whole steps and runs (slow).",
    parts=PARTS,
    prepare=prepare,
    add_flags=add_flags,
)
