"""The benchmark of the main job: every figure that it promises."""

from __future__ import annotations

from slime_spec.hf.model_spec import ModelSpec
from slime_spec.launch.bench.learning import check_learning
from slime_spec.launch.bench.rows import Benchmark, BenchOptions

HERE = "slime_spec.launch.bench"
PARTS = {
    "engine": f"{HERE}.engine:measure",
    "speculation": f"{HERE}.speculation:measure",
    "push": f"{HERE}.push:measure",
    "parity": f"{HERE}.parity:measure",
    "learning": f"{HERE}.learning:measure",
}
NEED_THE_MODEL = {"engine", "speculation", "push"}


def check(options: BenchOptions) -> None:
    """Refuse what a part would trip over later."""
    if NEED_THE_MODEL & set(options.parts):
        ModelSpec.from_folder(options.model)
    if "learning" in options.parts:
        check_learning(options)


MAIN_JOB = Benchmark(
    what="Engine speed and parity, speculation, weight push, trainer parity, and learning by whole runs (slow).",
    parts=PARTS,
    check=check,
)
