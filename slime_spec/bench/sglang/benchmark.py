"""The benchmark of the SGLang engine proves its properties on a real server and measures its speed."""

from __future__ import annotations

import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from tempfile import gettempdir

from rollout.sglang_engine.engine import SglangEngine
from slime_spec.algorithms import EAGLE, EAGLE3, NONE
from slime_spec.bench.rows import Benchmark, BenchOptions
from slime_spec.bench.sglang.settings import ALGORITHMS, CPU_ENGINE, drafting, engine_settings, num_gpus
from slime_spec.checkpoints.draft_choice import choose_draft
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.errors import ConfigError
from slime_spec.interfaces import unknown_choice
from slime_spec.sglang.interpreter import installed_in
from slime_spec.transports.in_process import InProcessTransport
from slime_spec.transports.torch_handles import check_torch

HERE = "slime_spec.bench.sglang"
PARTS = {
    "exactness": f"{HERE}.exactness:measure",
    "counters": f"{HERE}.counters:measure",
    "push": f"{HERE}.push:measure",
    "stale": f"{HERE}.stale:measure",
    "restart": f"{HERE}.restart:measure",
    "offload": f"{HERE}.offload:measure",
    "speed": f"{HERE}.speed:measure",
}
NEED_A_DRAFT = {"push", "stale", "restart", "offload", "speed"}
EPILOG = f"""\
Without a GPU SGLang runs on a CPU, here with the stand-in for its kernels that the tests use (the speeds are then the
stand-in's). Start this command with {CPU_ENGINE}=1 PYTHONPATH=tests/support/sglang_cpu OMP_NUM_THREADS=1, and with
--sglang-python "$(bash scripts/install-sglang-cpu.sh)"; its servers inherit the environment."""


def prepare(options: BenchOptions) -> None:
    """See Benchmark; checks every algorithm's draft, flags and interpreter before a server starts."""
    target = ModelSpec.from_folder(options.model)
    for algorithm in options.algorithms:
        if algorithm not in ALGORITHMS:
            raise unknown_choice("--algorithms", ALGORITHMS, algorithm)
    if NEED_A_DRAFT & set(options.parts):
        drafting(options)
    if num_gpus(options) == 0 and os.environ.get(CPU_ENGINE) != "1":
        raise ConfigError(CPU_ENGINE, "must be 1 where SGLang runs on a CPU", os.environ.get(CPU_ENGINE), EPILOG)
    for algorithm in (NONE.name, *options.algorithms):
        config = engine_settings(options, algorithm, ((0,),), 1, Path(gettempdir()))
        choose_draft(config, target)
        SglangEngine(config, 0, InProcessTransport())
    if "push" in options.parts and options.sglang_python is not None:
        check_torch(installed_in(options.sglang_python).torch_version)


def add_flags(parser: ArgumentParser) -> None:
    """See Benchmark."""
    parser.epilog, parser.formatter_class = EPILOG, RawDescriptionHelpFormatter  # users copy the lines of this text
    parser.add_argument("--sglang-python", metavar="PYTHON", help="Python of an environment with SGLang (this one)")
    parser.add_argument(
        "--draft", metavar="DRAFT", help=f"draft of {EAGLE.name} and {EAGLE3.name} ({BenchOptions.draft})"
    )
    parser.add_argument(
        "--algorithms",
        nargs="+",
        metavar="NAME",
        help=f"what the checkpoints allow of {', '.join(ALGORITHMS)}; the last that drafts with weights is pushed, "
        f"offloaded and raced ({' '.join(BenchOptions.algorithms)})",
    )
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help=f"({BenchOptions.dtype})")
    parser.add_argument("--num-gpus", metavar="N", type=int, help="GPUs of a server; 0: a CPU (1 where there is one)")
    parser.add_argument("--attention-backend", metavar="NAME", help="SGLang's (triton on a GPU, intel_amx on a CPU)")
    parser.add_argument(
        "--num-prompts", metavar="N", type=int, help=f"prompts of every part but speed ({BenchOptions.num_prompts})"
    )
    sizes = " ".join(map(str, BenchOptions.batch_sizes))
    parser.add_argument("--batch-sizes", nargs="+", metavar="N", type=int, help=f"of part speed ({sizes})")


SGLANG = Benchmark(
    what="The SGLang engine on real servers: exactness, counters, pushes, stale drafts, restart, offload, speed.",
    parts=PARTS,
    prepare=prepare,
    add_flags=add_flags,
    defaults=BenchOptions(num_rounds=3, num_new_tokens=32),
)
