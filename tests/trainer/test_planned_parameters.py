"""A rank holds of a policy what the memory plan says, to the byte, in every stage."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slime_spec.checkpoints.parameters import count_parameters
from slime_spec.preflight.trainer_memory import trainer_memory
from tests.support.tiny_models import MIXED
from tests.trainer.mixed_policies import LAYOUTS, TP2, mixed_policy
from tests.trainer.trainer_support import make_policy, run_ranks, tiny_config

OF_FOUR: dict[str, Any] = {**LAYOUTS["TP2 PP2 EP2"], "num_layers_in_last_pipeline_stage": 1}
SPLIT: dict[str, Any] = {**LAYOUTS["DP2 EP2"], "use_distributed_optimizer": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{name}, TP2 PP2 EP2 of three layers and one": (name, OF_FOUR) for name in MIXED},
    "TP2 ETP2 in bfloat16": ("DeepseekV3ForCausalLM", {**TP2, "dtype": "bfloat16"}),
    "PP2 of a tied embedding": ("LlamaForCausalLM", dict(LAYOUTS["PP2"])),
}


@pytest.mark.parametrize("case", CASES)
def test_a_rank_of_each_stage_has_the_bytes_that_are_planned(case: str, tmp_path: Path) -> None:
    architecture, trainer = CASES[case]
    is_mixed = architecture in MIXED
    folder = mixed_policy(tmp_path, architecture) if is_mixed else make_policy(tmp_path, architecture, tied=True)
    config = tiny_config(folder, trainer)
    target = json.loads((folder / "config.json").read_text())
    counted = count_parameters(target)
    assert counted is not None
    stages = trainer_memory(config, target, counted)
    assert len(stages) == config.trainer.pipeline_model_parallel_size
    found = run_ranks(config.trainer.world_size, "held_bytes", config)
    per_stage = config.trainer.world_size // len(stages)
    for rank, held in enumerate(found):
        planned = stages[rank // per_stage]
        assert held == {
            "weights": planned.weights_bytes,
            "gradients": planned.gradient_bytes,
            "updated": planned.num_updated,
        }
    assert len({json.dumps(each) for each in found}) == len(stages), "stages differ, the ranks of a stage do not"


def test_a_distributed_optimizer_has_experts_split_over_the_copies_of_each(tmp_path: Path) -> None:
    """Two ranks have other experts and the same of all else: of this alone each updates a half."""
    folder = mixed_policy(tmp_path, "Qwen3MoeForCausalLM")
    config = tiny_config(folder, SPLIT)
    target = json.loads((folder / "config.json").read_text())
    counted = count_parameters(target)
    assert counted is not None
    (planned,) = trainer_memory(config, target, counted)
    found = run_ranks(2, "held_bytes", config)
    for held in found:
        assert (held["weights"], held["gradients"]) == (planned.weights_bytes, planned.gradient_bytes)
    assert sum(held["updated"] for held in found) == 2 * planned.num_updated
    unsplit = replace(config, trainer=replace(config.trainer, use_distributed_optimizer=False))
    (whole,) = trainer_memory(unsplit, target, counted)
    of_experts = sum(layer.experts for layer in counted.layers) // 2
    assert planned.num_updated - of_experts == (whole.num_updated - of_experts) // 2
