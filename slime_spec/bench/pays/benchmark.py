"""The benchmark of what speculation pays has one part per scenario."""

from __future__ import annotations

from argparse import ArgumentParser
from functools import partial
from pathlib import Path

import torch

from slime_spec.bench.eagle3 import VERIFICATIONS
from slime_spec.bench.pays.scenarios import LONGEST_IN_JOB, Scenario, scenarios
from slime_spec.bench.pays.sides import AUTO, AUTOMATIC, repeat, side_configs, started_cores
from slime_spec.bench.pays.verdict import Where, rows_of
from slime_spec.bench.prompts import Prompts, in_domain
from slime_spec.bench.rows import Benchmark, BenchOptions, Row
from slime_spec.checkpoints.draft_choice import choose_draft
from slime_spec.checkpoints.model_spec import ModelSpec

HERE = "slime_spec.bench.pays.benchmark"
NUM_PROMPTS = 64
DEFAULTS = BenchOptions(seeds=(0,), num_rounds=3, num_new_tokens=LONGEST_IN_JOB)
PARTS = {name: f"{HERE}:at_{name}" for name in scenarios(DEFAULTS.num_new_tokens)}


def measure(name: str, options: BenchOptions) -> list[Row]:
    """Measure the scenario of this name."""
    scenario = scenarios(options.num_new_tokens)[name]
    return measure_scenario(
        options, scenario, in_domain(policy_of(options), NUM_PROMPTS, options.seeds[0], scenario.suite)
    )


at_64 = partial(measure, "64")
at_64_tail = partial(measure, "64_tail")
at_longtail = partial(measure, "longtail")
at_8 = partial(measure, "8")
at_4 = partial(measure, "4")
at_1 = partial(measure, "1")


def measure_scenario(options: BenchOptions, scenario: Scenario, prompts: Prompts) -> list[Row]:
    """Start the sides anew, so that what they learn is of this scenario alone, and let them take turns."""
    configs = side_configs(options, str(policy_of(options)), scenario.depths)
    cores = started_cores(configs)
    times = repeat(scenario, cores, prompts, options.seeds[0], options.num_rounds)
    where = Where("untrained" if options.policy is None else "trained", scenario.name, options.rule)
    bound = scenario.untrained if options.policy is None else scenario.trained
    return rows_of(where, times, {name: cores[name].speculation.pays_up_to for name in AUTOMATIC}, bound)


def policy_of(options: BenchOptions) -> Path:
    return options.policy or options.model


def prepare(options: BenchOptions) -> None:
    """See Benchmark; by default one thread computes."""
    target = ModelSpec.from_folder(policy_of(options))
    choose_draft(side_configs(options, str(policy_of(options)), depths=())[AUTO], target)
    torch.set_num_threads(options.threads or 1)


def add_flags(parser: ArgumentParser) -> None:
    """See Benchmark."""
    parser.add_argument(
        "--policy", metavar="FOLDER", type=Path, help="checkpoint of a trained policy, measured in place of --model"
    )
    parser.add_argument("--rule", choices=VERIFICATIONS, help=f"how EAGLE-3's drafts are judged ({BenchOptions.rule})")
    parser.add_argument("--draft", metavar="DRAFT", help=f"the EAGLE-3 draft ({BenchOptions.draft})")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help=f"of every engine ({BenchOptions.dtype})")
    parser.add_argument("--threads", metavar="N", type=int, help="compute threads of every engine (1)")


PAYS = Benchmark(
    what="What speculation pays at 64, 8, 4 and 1 sequences at once: automatic depth against off and fixed depths.",
    parts=PARTS,
    prepare=prepare,
    add_flags=add_flags,
    defaults=DEFAULTS,
)
