"""Sizes that do not fit are refused before anything heavy; ranks count as Megatron counts them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.errors import ConfigError
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
