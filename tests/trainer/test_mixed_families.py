"""Policies with experts, latent attention or partial rotation, in every layout against transformers and autograd."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from slime_spec.bench.reference_trainer import near_policy, reference_steps, tiny_samples
from slime_spec.types import TrainReport, TrainSample
from tests.support.tiny_models import MIXED, YARN
from tests.trainer.mixed_policies import (
    BIAS,
    LAYOUTS,
    Reference,
    assert_is_transformers,
    by_expert,
    mixed_policy,
    passed,
    reference_pass,
)
from tests.trainer.trainer_support import run_ranks, tiny_config

NUM_STEPS = 3
SPLIT_GRADIENTS = "DP2 EP2 with the distributed optimizer"  # of which no rank has the sum of all
OF_FOUR_RANKS = "TP2 PP2 EP2"
pytestmark = pytest.mark.proves("trainer_bridge")

QUICK = [name for name in LAYOUTS if name not in (SPLIT_GRADIENTS, OF_FOUR_RANKS)]
LAYOUTS_OF_PASSES = [*QUICK, pytest.param(OF_FOUR_RANKS, marks=pytest.mark.long)]
LAYOUTS_OF_STEPS = [*LAYOUTS_OF_PASSES, SPLIT_GRADIENTS]


@pytest.fixture(params=MIXED)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference_of(request.param, tmp_path_factory.getbasetemp())


@cache
def reference_of(architecture: str, folder: Path) -> Reference:
    return reference_pass(mixed_policy(folder / architecture, architecture))


@pytest.mark.parametrize("layout", LAYOUTS_OF_PASSES)
def test_a_pass_is_transformers(layout: str, reference: Reference) -> None:
    assert_is_transformers(passed(reference, dict(LAYOUTS[layout])), reference)


VARIANTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "weights of experts that are not renormalised": ("Qwen3MoeForCausalLM", {"norm_topk_prob": False}),
    "experts in every other layer": ("Qwen3MoeForCausalLM", {"decoder_sparse_step": 2, "mlp_only_layers": []}),
    "neither norms nor biases of queries": ("Glm4MoeForCausalLM", {"use_qk_norm": False, "attention_bias": False}),
    "two shared experts": ("Glm4MoeForCausalLM", {"n_shared_experts": 2}),
    "groups of experts that are all chosen": ("DeepseekV3ForCausalLM", {"n_group": 2, "topk_group": 2}),
    "queries without a latent": ("DeepseekV3ForCausalLM", {"q_lora_rank": None}),
    "halves in place of pairs": ("DeepseekV3ForCausalLM", {"rope_interleave": False}),
    "no YaRN": ("DeepseekV3ForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "YaRN that scales cosines": ("DeepseekV3ForCausalLM", {"rope_parameters": {**YARN, "mscale": 0.5}}),
    "a large epsilon of all norms but the latents'": ("DeepseekV3ForCausalLM", {"rms_norm_eps": 1e-3}),
}


@pytest.mark.parametrize("layout", ["one rank", "TP2 EP2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pass_of_a_variant_is_transformers(variant: str, layout: str, tmp_path: Path) -> None:
    architecture, overrides = VARIANTS[variant]
    reference = reference_pass(mixed_policy(tmp_path, architecture, **overrides))
    assert_is_transformers(passed(reference, dict(LAYOUTS[layout])), reference)


@pytest.mark.long
def test_a_stage_without_experts_passes_on_to_one_whose_experts_are_spread(tmp_path: Path) -> None:
    reference = reference_pass(mixed_policy(tmp_path, "Glm4MoeForCausalLM", first_k_dense_replace=2))
    trainer = {"world_size": 4, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}
    assert_is_transformers(passed(reference, trainer), reference)


@dataclass(frozen=True)
class Steps:
    """Three steps of Hugging Face with AdamW: what they are of, what they report, and the weights they leave."""

    batches: Sequence[Sequence[TrainSample]]
    reports: Sequence[TrainReport]
    weights: Mapping[str, torch.Tensor]


# Adam's epsilon is that large so that a gradient of zero, but for rounding, moves a weight by nothing.
SETTINGS = {"weight_decay": 0.1, "clip_grad": 0.5, "adam_eps": 1e-4}


@cache
def steps_of(folder: Path) -> Steps:
    batches = [near_policy(folder, tiny_samples(seed)) for seed in range(NUM_STEPS)]
    reports, stacked = reference_steps(tiny_config(folder, SETTINGS), batches)
    return Steps(batches, reports, by_expert(stacked))


@pytest.mark.parametrize("layout", LAYOUTS_OF_STEPS)
def test_three_steps_are_those_of_hugging_face_with_adamw(layout: str, reference: Reference) -> None:
    steps = steps_of(reference.folder)
    config = tiny_config(reference.folder, {**LAYOUTS[layout], **SETTINGS})
    answers = run_ranks(config.trainer.world_size, "train", config, steps.batches)
    assert {name for _, _, after in answers for name in after} == steps.weights.keys()
    for before, reports, after in answers:
        for got, expected in zip(reports, steps.reports, strict=True):
            assert got.loss == pytest.approx(expected.loss, abs=1e-4)
            assert got.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3)
            assert got.grad_norm > config.trainer.clip_grad
            assert got.entropy == pytest.approx(expected.entropy, abs=1e-4)
        for name, tensor in after.items():
            torch.testing.assert_close(tensor, steps.weights[name], atol=1e-3, rtol=0.0)
            if BIAS in name:
                assert torch.equal(tensor, before[name]), "a step moves no router's bias"
            elif "experts." not in name:
                assert (tensor - before[name]).abs().max() > 5e-3, f"{name} hardly moved"
