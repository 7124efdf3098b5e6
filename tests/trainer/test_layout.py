"""Sizes that do not fit are refused before anything heavy; ranks count as Megatron counts them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.errors import ConfigError
from tests.trainer.mixed_policies import mixed_policy
from tests.trainer.trainer_support import make_policy, run_ranks, tiny_config
from trainer_bridge.layout import Layout, check_layout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy"))


@pytest.mark.parametrize(
    ("trainer", "change", "setting", "value"),
    [
        ({"world_size": 3, "tensor_model_parallel_size": 2}, {}, "trainer.world_size", 3),
        ({"world_size": 2, "pipeline_model_parallel_size": 4}, {}, "trainer.world_size", 2),
        (
            {"world_size": 4, "tensor_model_parallel_size": 4},
            {},
            "trainer.tensor_model_parallel_size",
            4,
        ),
        (
            {"world_size": 2, "tensor_model_parallel_size": 2},
            {"num_heads": 3, "num_kv_heads": 3},
            "trainer.tensor_model_parallel_size",
            2,
        ),
        (
            {"world_size": 2, "tensor_model_parallel_size": 2},
            {"vocab_size": 161},
            "trainer.tensor_model_parallel_size",
            2,
        ),
        (
            {"world_size": 3, "pipeline_model_parallel_size": 3},
            {},
            "trainer.pipeline_model_parallel_size",
            3,
        ),
        ({"world_size": 2, "num_gpus": 1}, {}, "trainer.num_gpus", 1),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_setting_and_value(
    folder: Path, trainer: dict[str, Any], change: dict[str, Any], setting: str, value: int
) -> None:
    spec = replace(ModelSpec.from_folder(folder), **change)
    with pytest.raises(ConfigError) as refused:
        check_layout(tiny_config(folder, trainer), spec)
    assert (refused.value.setting, refused.value.value) == (setting, value)
    assert refused.value.remedy


EP2 = {"expert_model_parallel_size": 2}
TP2 = {"world_size": 2, "tensor_model_parallel_size": 2}
MIXED_SPECS = ("Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: mixed_policy(tmp_path_factory.mktemp("policy"), name) for name in MIXED_SPECS}


@pytest.mark.parametrize(
    ("architecture", "trainer", "of_experts", "setting", "value"),
    [
        # Each tensor rank would give its experts other tokens, and keep what they learn to itself.
        (
            "Qwen3MoeForCausalLM",
            {**TP2, "expert_tensor_parallel_size": 1},
            {},
            "trainer.expert_tensor_parallel_size",
            1,
        ),
        ("Qwen3MoeForCausalLM", {"expert_tensor_parallel_size": 2}, {}, "trainer.expert_tensor_parallel_size", 2),
        ("Qwen3MoeForCausalLM", {**TP2, **EP2}, {}, "trainer.expert_model_parallel_size", 2),
        ("Qwen3MoeForCausalLM", EP2, {}, "trainer.expert_model_parallel_size", 2),
        (
            "Qwen3MoeForCausalLM",
            {"world_size": 3, "expert_model_parallel_size": 3},
            {},
            "trainer.expert_model_parallel_size",
            3,
        ),
        ("Qwen3MoeForCausalLM", TP2, {"width": 33}, "trainer.expert_tensor_parallel_size", 2),
        ("Qwen3MoeForCausalLM", {}, {"num_per_token": 1}, "model.hf_checkpoint: num_experts_per_tok", 1),
        ("DeepseekV3ForCausalLM", {}, {"renormalises": False}, "model.hf_checkpoint: norm_topk_prob", False),
        ("DeepseekV3ForCausalLM", {}, {"num_groups_per_token": 1}, "model.hf_checkpoint: topk_group", 1),
        ("DeepseekV3ForCausalLM", {}, {"num_per_token": 2}, "model.hf_checkpoint: topk_group", 2),
    ],
)
def test_experts_that_ranks_cannot_share_or_megatron_routes_otherwise_are_refused(
    mixed: dict[str, Path],
    architecture: str,
    trainer: dict[str, Any],
    of_experts: dict[str, Any],
    setting: str,
    value: object,
) -> None:
    spec = ModelSpec.from_folder(mixed[architecture])
    assert spec.experts is not None
    with pytest.raises(ConfigError) as refused:
        check_layout(
            tiny_config(mixed[architecture], trainer), replace(spec, experts=replace(spec.experts, **of_experts))
        )
    assert (refused.value.setting, refused.value.value) == (setting, value)
    assert refused.value.remedy


def test_a_latent_that_tensor_ranks_cannot_share_is_refused(mixed: dict[str, Path]) -> None:
    spec = ModelSpec.from_folder(mixed["DeepseekV3ForCausalLM"])
    assert spec.latent is not None
    with pytest.raises(ConfigError, match="latent of queries"):
        check_layout(
            tiny_config(mixed["DeepseekV3ForCausalLM"], TP2), replace(spec, latent=replace(spec.latent, query_rank=23))
        )


def test_a_dense_model_has_no_experts_to_spread_and_takes_no_notice_of_how_they_would_be_split(folder: Path) -> None:
    spec = ModelSpec.from_folder(folder)
    with pytest.raises(ConfigError, match="without experts"):
        check_layout(tiny_config(folder, {"world_size": 2, **EP2}), spec)
    config = tiny_config(folder, {**TP2, "expert_tensor_parallel_size": 1})
    assert check_layout(config, spec) == Layout(tensor=2, pipeline=1, data=1)


def test_holders_of_a_stage_with_experts_are_whole_groups_of_every_kind() -> None:
    assert Layout(tensor=2, pipeline=1, data=4, expert=4, expert_tensor=1).holders(0) == (0, 1, 2, 3)
    assert Layout(tensor=2, pipeline=2, data=3, expert=3, expert_tensor=1).holders(1) == (6, 7, 8, 9, 10, 11)
    assert Layout(tensor=4, pipeline=1, data=2, expert=2, expert_tensor=1).holders(0) == (0, 1, 2, 3)
    assert Layout(tensor=2, pipeline=1, data=2, expert=2).holders(0) == (0, 1, 2, 3)


def test_what_is_left_of_the_world_is_data_parallel(folder: Path) -> None:
    config = tiny_config(folder, {"world_size": 8, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2})
    assert check_layout(config, ModelSpec.from_folder(folder)) == Layout(tensor=2, pipeline=2, data=2)


def test_coordinates_are_megatrons(folder: Path) -> None:
    layout = Layout(tensor=2, pipeline=2, data=1)
    answers = run_ranks(4, "group_coordinates", layout)
    assert answers == [layout.coordinates(rank) for rank in range(4)]


def test_holders_of_a_stage_are_its_tensor_ranks_of_the_first_replica() -> None:
    layout = Layout(tensor=2, pipeline=2, data=2)
    assert layout.holders(0) == (0, 1)
    assert layout.holders(1) == (4, 5)
    for stage in range(2):
        places = [layout.coordinates(rank) for rank in layout.holders(stage)]
        assert [place.tensor for place in places] == [0, 1]
        assert {(place.data, place.pipeline) for place in places} == {(0, stage)}
