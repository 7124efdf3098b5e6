"""Sizes that do not fit are refused before anything heavy; ranks count as Megatron counts them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.pipeline_stages import stage_layers
from slime_spec.config.tree import TrainerConfig
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


def staged(num_stages: int, first: int | None = None, last: int | None = None) -> TrainerConfig:
    return TrainerConfig(
        pipeline_model_parallel_size=num_stages,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )


@pytest.mark.parametrize(
    ("num_layers", "trainer", "sizes"),
    [
        (92, staged(4), [23, 23, 23, 23]),
        (61, staged(4, last=13), [16, 16, 16, 13]),  # as slime splits DeepSeek-R1
        (61, staged(8, first=7, last=6), [7, 8, 8, 8, 8, 8, 8, 6]),
        (94, staged(4, last=22), [24, 24, 24, 22]),
        (4, staged(2, first=1), [1, 3]),
        (4, staged(2, first=1, last=3), [1, 3]),
        (4, staged(1), [4]),
    ],
)
def test_stages_have_the_layers_that_are_given_and_share_the_others(
    num_layers: int, trainer: TrainerConfig, sizes: list[int]
) -> None:
    stages = stage_layers(num_layers, trainer)
    assert [len(stage) for stage in stages] == sizes
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))


@pytest.mark.parametrize(
    ("num_layers", "trainer", "setting", "value", "told"),
    [
        (61, staged(4), "trainer.pipeline_model_parallel_size", 4, ("layers (61)", "num-layers 13.")),
        (5, staged(4), "trainer.pipeline_model_parallel_size", 4, ("layers (5)", "num-layers 2.")),
        (61, staged(4, last=12), "trainer.num_layers_in_last_pipeline_stage", 12, ("3 of 4 stages", "49 are left")),
        (61, staged(4, first=13, last=13), "trainer.num_layers_in_last_pipeline_stage", 13, ("2 of 4", "35 are left")),
        (4, staged(2, first=4), "trainer.num_layers_in_first_pipeline_stage", 4, ("1 of 2 stages", "0 are left")),
        (4, staged(2, first=9), "trainer.num_layers_in_first_pipeline_stage", 9, ("4 layers", "-5 are left")),
        (4, staged(2, first=1, last=2), "trainer.num_layers_in_last_pipeline_stage", 2, ("(1) must make up all 4",)),
        (4, staged(1, last=4), "trainer.num_layers_in_last_pipeline_stage", 4, ("there is one", "Leave it out")),
    ],
)
def test_stages_that_do_not_add_up_are_refused_with_the_numbers(
    num_layers: int, trainer: TrainerConfig, setting: str, value: int, told: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as refused:
        stage_layers(num_layers, trainer)
    assert (refused.value.setting, refused.value.value) == (setting, value)
    for words in told:
        assert words in str(refused.value)


@pytest.mark.parametrize(("num_layers", "num_stages"), [(61, 4), (61, 8), (61, 16), (5, 4), (94, 4), (94, 8), (92, 8)])
def test_the_last_stage_that_a_refusal_names_is_one_that_is_taken(num_layers: int, num_stages: int) -> None:
    with pytest.raises(ConfigError) as refused:
        stage_layers(num_layers, staged(num_stages))
    named = int(refused.value.remedy.rpartition(" ")[2].rstrip("."))
    assert len(stage_layers(num_layers, staged(num_stages, last=named))[-1]) == named


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
