"""Print what the engine knows of its rounds: a plain step's time, and break-even lengths by batch, context and length.

The passes are those that the engine times at its start; a few rounds of each length, on the main job's prompts, tell it
what drafting costs. Nothing else is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import process_time

from rollout.embedded.calibrate import calibrate, costs_of
from slime_spec.algorithms import EAGLE3
from slime_spec.bench.fixed_depth import FITTED_TOKENS, fit_drafting
from slime_spec.bench.local_engine import engine_config
from slime_spec.bench.plain import SHORT
from slime_spec.bench.prompts import Prompts, in_domain, rotating
from slime_spec.bench.random_engine import assembly_of
from slime_spec.bench.rows import BenchOptions, Row
from slime_spec.bench.timing import Clock, settled, tell
from slime_spec.config.tree import SpeculativeConfig
from slime_spec.speculation.cost_table import CostTable
from slime_spec.types import GroupRequest, SamplingParams

DTYPES = ("float32", "bfloat16")
NUM_PROMPTS = 32


def measure(options: BenchOptions) -> list[Row]:
    prompts = in_domain(options.model, NUM_PROMPTS, options.seeds[0])
    return measure_round_costs(options, prompts, options.dtypes or DTYPES)


def measure_round_costs(options: BenchOptions, prompts: Prompts, dtypes: Sequence[str]) -> list[Row]:
    """Return the rows of each dtype's table, and print the table beside the progress."""
    rows: list[Row] = []
    for dtype in dtypes:
        table = timed_table(options, prompts, dtype)
        for line in table.text():
            tell(line)
        rows += table_rows(dtype, table)
    return rows


def timed_table(options: BenchOptions, prompts: Prompts, dtype: str) -> CostTable:
    """Start an engine's core as a run does, let it draft a few rounds, and return what it knows then."""
    config = engine_config(options.model, dtype, num_gpus=options.num_gpus or 0)
    config = replace(config, speculative=SpeculativeConfig(algorithm=EAGLE3.name, draft_model_path=options.draft))
    clock: Clock = settled if options.num_gpus else process_time
    core = assembly_of(options)(config).core(0, clock)
    calibrate(core)
    params = SamplingParams(max_new_tokens=FITTED_TOKENS, ignore_eos=True)
    fit_drafting(
        core,
        lambda batch: [
            GroupRequest(str(index), prompt, (index,), params)
            for index, prompt in enumerate(rotating(prompts, 0, batch))
        ],
    )
    table = costs_of(core)
    assert table is not None, "the core speculates"
    return table


def table_rows(dtype: str, table: CostTable) -> list[Row]:
    """Return each line's plain step, its break-even lengths, and what drafts that are all accepted would bring."""
    short, rows = SHORT[dtype], []
    for line in table.lines:
        where = f"{short}, batch {line.batch}, context {line.context}"
        prefix = f"rounds.{short}.b{line.batch}.c{line.context}"
        rows.append(Row(f"{prefix}.plain", f"{where}: a plain step", 1000 * line.plain_s, "ms"))
        for depth, length in zip(table.depths, line.break_even, strict=True):
            what = f"{where}, chain of {depth}: a round over a plain step, the break-even accept length"
            rows.append(Row(f"{prefix}.d{depth}.break_even", what, length, "tokens/round"))
        what = f"{where}: drafts that are all accepted, over plain steps: no draft brings more"
        rows.append(Row(f"{prefix}.most", what, table.most(line), "x"))
    return rows
