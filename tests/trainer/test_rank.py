"""What one rank refuses, exports and publishes."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import expected_shapes, load_tensors
from slime_spec.config.tree import RolloutConfig
from slime_spec.types import TrainSample
from tests.support.tiny_models import load_reference
from tests.trainer.trainer_support import make_policy, run_ranks, tiny_config, tiny_samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy"), "Qwen2ForCausalLM", tied=True)


def test_a_sample_longer_than_the_models_context_is_refused(folder: Path) -> None:
    sample = TrainSample(tuple(range(129)), 120, (-1.0,) * 9, 1.0)
    (problem,) = run_ranks(1, "step_error", tiny_config(folder), [sample])
    assert "context of 128 tokens" in problem
    assert "129" in problem


def test_a_pushed_stage_is_all_of_its_tensors_and_every_checksum_holds(folder: Path) -> None:
    config = tiny_config(folder, {"world_size": 2, "pipeline_model_parallel_size": 2})
    answers = run_ranks(2, "push_to_a_receiver", config)
    names = [name for _, part in answers for name in part]
    assert sorted(names) == sorted(expected_shapes(ModelSpec.from_folder(folder)))
    assert all(num_buckets > 1 for num_buckets, _ in answers), "the test should span several buckets"


def test_only_the_first_tensor_rank_publishes(folder: Path) -> None:
    config = tiny_config(folder, {"world_size": 2, "tensor_model_parallel_size": 2})
    (first, names), (second, nothing) = run_ranks(2, "push_to_a_receiver", config)
    assert set(names) == expected_shapes(ModelSpec.from_folder(folder)).keys()
    assert first > 1
    assert (second, nothing) == (0, [])


def test_where_every_rank_publishes_each_publishes_all(folder: Path) -> None:
    config = tiny_config(folder, {"world_size": 2, "tensor_model_parallel_size": 2})
    first, second = run_ranks(2, "push_to_a_receiver", config, True)
    assert first == second
    assert set(first[1]) == expected_shapes(ModelSpec.from_folder(folder)).keys()


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_an_export_is_a_checkpoint_that_transformers_loads(kind: str, folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    config = tiny_config(folder, {"world_size": 2, f"{kind}_model_parallel_size": 2})
    run_ranks(2, "export", config, str(tmp_path / "export"))
    original = load_file(folder / "model.safetensors")
    exported = load_tensors(tmp_path / "export", ModelSpec.from_folder(tmp_path / "export"))
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in original.items())
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        logits = load_reference(tmp_path / "export")(tokens).logits
        assert torch.equal(logits, load_reference(folder)(tokens).logits)
    assert (tmp_path / "export" / "tokenizer.json").read_text() == "{}"


def test_an_export_replaces_one_of_another_layout_whole(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "export"
    run_ranks(2, "export", tiny_config(folder, {"world_size": 2, "pipeline_model_parallel_size": 2}), str(target))
    assert "model.safetensors.index.json" in {path.name for path in target.iterdir()}
    run_ranks(1, "export", tiny_config(folder), str(target))
    assert {path.name for path in target.iterdir() if "model" in path.name} == {"model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_an_export_that_does_not_fit_names_the_folder_and_leaves_the_earlier_one(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "export"
    (problem,) = run_ranks(1, "export_onto_a_full_disk", tiny_config(folder), str(target))
    assert str(target) in problem
    assert "GB free" in problem
    exported = load_tensors(target, ModelSpec.from_folder(target))
    assert all(torch.equal(exported[name], tensor) for name, tensor in load_file(folder / "model.safetensors").items())
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_an_export_does_not_replace_a_folder_of_something_else(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(AssertionError, match="must be new, empty or an earlier export"):
        run_ranks(1, "export", tiny_config(folder), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loss_that_is_not_finite_stops_every_rank_before_it_reaches_the_weights(
    kind: str, dtype: str, folder: Path
) -> None:
    good = tiny_samples(seed=1)
    poison = replace(good[0], rollout_logprobs=(math.nan, *good[0].rollout_logprobs[1:]))
    config = tiny_config(folder, {"world_size": 2, f"{kind}_model_parallel_size": 2, "dtype": dtype})
    for problem, unchanged, grad_norm in run_ranks(2, "poisoned_step", config, [poison, *good[1:]]):
        assert "optimizer step 1 has loss nan" in problem
        assert unchanged
        assert 0 < grad_norm < math.inf


def test_temperatures_that_the_sampler_treats_as_greedy_train_at_temperature_1(folder: Path) -> None:
    samples = [tiny_samples()]
    greedy = replace(tiny_config(folder), rollout=RolloutConfig(temperature=1e-7))
    ((_, reports, _),) = run_ranks(1, "train", greedy, samples)
    ((_, expected, _),) = run_ranks(1, "train", tiny_config(folder), samples)
    assert reports == expected


def test_bfloat16_weights_with_float32_masters_train_like_float32(folder: Path) -> None:
    samples = [tiny_samples(seed) for seed in (1, 2, 3)]
    ((_, exact, _),) = run_ranks(1, "train", tiny_config(folder, {"lr": 1e-3}), samples)
    ((before, rounded, after),) = run_ranks(1, "train", tiny_config(folder, {"lr": 1e-3, "dtype": "bfloat16"}), samples)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert any(not torch.equal(before[name], tensor) for name, tensor in after.items())
    for got, expected in zip(rounded, exact, strict=True):
        assert got.entropy == pytest.approx(expected.entropy, rel=0.02)
        assert got.train_rollout_logprob_abs_diff == pytest.approx(expected.train_rollout_logprob_abs_diff, rel=0.02)


@pytest.mark.parametrize(
    "split", [{}, {"world_size": 2, "use_distributed_optimizer": True}], ids=["1x1", "split over 2"]
)
def test_masters_of_bfloat16_weights_begin_at_the_checkpoints_own_values(split: dict, folder: Path) -> None:
    (exact,) = run_ranks(1, "updated_values", tiny_config(folder))
    config = tiny_config(folder, {"dtype": "bfloat16", **split})
    found = {name: torch.full_like(values, math.nan) for name, (_, values) in exact.items()}
    for rank in run_ranks(config.trainer.world_size, "updated_values", config):
        for name, (start, values) in rank.items():
            found[name][start : start + len(values)] = values
    assert any(not torch.equal(values, values.bfloat16().float()) for _, values in exact.values())
    for name, (_, values) in exact.items():
        assert torch.equal(found[name], values), name


def test_updates_far_below_the_rounding_of_bfloat16_change_weights_at_once(folder: Path) -> None:
    """One step of Adam moves no weight by more than the learning rate; some are that near to where they round up."""
    lr = 1e-5
    config = tiny_config(folder, {"lr": lr, "dtype": "bfloat16"})
    ((before, _, after),) = run_ranks(1, "train", config, [tiny_samples(seed=1)])
    num_changed = 0
    for name, tensor in before.items():
        old, new = tensor.float(), after[name].float()
        coarse = old.abs() * 2.0**-9 > 10 * lr  # less than half of the distance to the next number
        num_changed += int((old != new)[coarse].sum())
    assert num_changed > 0
