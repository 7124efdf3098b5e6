"""The table of recipes in docs/launch.md, made from the plans that a dry run prints.

    python -m tests.support.recipe_table

writes the table into the document again.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from slime_spec.config.tree import Config
from slime_spec.launch.compose import composed
from slime_spec.launch.dry_run.placement import counted
from slime_spec.launch.dry_run.plan import Plan, make_plan
from slime_spec.launch.preflight import look
from slime_spec.preflight.gpu_memory import GB, Phase
from tests.support.recipes import RECIPES, STAGED

DOC = Path(__file__).resolve().parents[2] / "docs" / "launch.md"
BEGIN, END = "<!-- recipes: python -m tests.support.recipe_table -->\n", "<!-- /recipes -->\n"
HEADS = ("recipe", "nodes x GPUs", "trainer", "engines", "load / start / rollout / train / push", "host", "draft")


def table() -> str:
    """The recipes, and below each with a layout in slime's stages that layout."""
    rows = []
    for name in RECIPES:
        rows.append(_row(name, ()))
        if name in STAGED:
            rows.append(_row(name, STAGED[name]))
    lines = [HEADS, ("---",) * len(HEADS), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _row(name: str, more: tuple[str, ...]) -> tuple[str, ...]:
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(look(composed([*RECIPES[name].arguments(Path(folder)), *more])))
    config = plan.facts.config
    host = plan.host
    assert host is not None, "every recipe trains on GPUs"
    return (
        "the same in stages" if more else f"`{name}`",
        f"{host.num_nodes} x {host.num_ranks} of {config.cluster.gpu_memory_gb:.0f} GB",
        ", ".join(_sizes(plan)),
        _engines(config),
        " / ".join(f"{sum(each.total(phase) for each in plan.gpus) / GB:.0f}" for phase in Phase),
        f"{host.trainer_bytes / GB:.0f} + {host.push_bytes / GB:.0f}",
        _draft(plan),
    )


def _sizes(plan: Plan) -> Iterator[str]:
    trainer = plan.facts.config.trainer
    yield f"TP {trainer.tensor_model_parallel_size}"
    if len(plan.memory.stages) > 1:
        last = trainer.num_layers_in_last_pipeline_stage
        yield f"PP {len(plan.memory.stages)}" + (f" ({last} layers in the last)" if last else "")
    if trainer.expert_model_parallel_size > 1:
        yield f"EP {trainer.expert_model_parallel_size}"
        yield f"ETP {trainer.expert_tensor_parallel_size}"


def _engines(config: Config) -> str:
    rollout = config.rollout
    attention = f", attention DP {config.sglang['dp_size']}" if config.sglang.get("enable_dp_attention") else ""
    return f"{rollout.num_engines} of {counted(rollout.num_gpus_per_engine, 'GPU')}{attention}"


def _draft(plan: Plan) -> str:
    config = plan.facts.config
    kind = "its MTP layer" if plan.facts.draft_kind == "in_target" else "EAGLE-3"
    return f"{kind}, trained" if config.trains_draft else kind


def with_table(document: str) -> str:
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


if __name__ == "__main__":
    DOC.write_text(with_table(DOC.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(0)
