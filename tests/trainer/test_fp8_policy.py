"""A policy from a checkpoint in fp8 trains the numbers that it stands for, and is exported as numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slime_spec.checkpoints.folder import CheckpointFolder
from slime_spec.checkpoints.model_files import TargetFiles
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.quantization import coded_names
from slime_spec.checkpoints.tensors import expected_shapes, load_tensors
from slime_spec.config.tree import EngineConfig, RolloutConfig
from slime_spec.transports.kept import unpacked_from_ray
from tests.support.fp8_checkpoints import numbers_of, store_in_fp8, store_numbers
from tests.support.tiny_models import add_mtp_layer, load_reference
from tests.trainer.mixed_policies import DP2_EP2, LAYOUTS, TP2_EP2, mixed_policy
from tests.trainer.trainer_support import run_ranks, tiny_config, tiny_samples

BIAS = "e_score_correction_bias"


@pytest.fixture(scope="module")
def r1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_in_fp8(add_mtp_layer(mixed_policy(tmp_path_factory.mktemp("r1"), "DeepseekV3ForCausalLM")), (16, 24))


@pytest.mark.parametrize("layout", ["one rank", "TP2 EP2", "PP2", "DP2 EP2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_trainer_has_the_numbers_in_its_dtype(dtype: str, layout: str, r1: Path) -> None:
    wanted, laid_out = numbers_of(r1), LAYOUTS[layout]
    ranks = run_ranks(laid_out.get("world_size", 1), "train", tiny_config(r1, {**laid_out, "dtype": dtype}), [])
    weights: dict[str, torch.Tensor] = {name: tensor for before, _, _ in ranks for name, tensor in before.items()}
    assert weights.keys() == expected_shapes(ModelSpec.from_folder(r1)).keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, wanted[name] if BIAS in name else wanted[name].to(tensor.dtype)), name
        assert str(tensor.dtype) == ("torch.float32" if BIAS in name else f"torch.{dtype}")


def test_a_bfloat16_trainer_updates_the_unrounded_numbers(r1: Path) -> None:
    (values,) = run_ranks(1, "updated_values", tiny_config(r1, {"dtype": "bfloat16"}))
    wanted = numbers_of(r1)["model.layers.0.self_attn.o_proj.weight"]
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    (found,) = (flat for own, (_, flat) in values.items() if own.endswith(name))
    assert torch.equal(found, wanted.flatten())
    assert not torch.equal(found, found.bfloat16().float())


@pytest.mark.parametrize("layout", [{}, TP2_EP2, DP2_EP2], ids=["one rank", "TP2 EP2", "DP2 EP2"])
def test_a_server_of_fp8_is_pushed_codes_and_scales(layout: Mapping[str, Any], r1: Path) -> None:
    config = replace(
        tiny_config(r1, {**layout, "dtype": "bfloat16"}),
        engine=EngineConfig(dtype="bfloat16"),
        rollout=RolloutConfig(engine="sglang"),
    )
    packed, *nothing = run_ranks(config.trainer.world_size, "pushed_tensors", config)
    assert nothing in ([], [{}])
    pushed = unpacked_from_ray(packed)
    stored = load_file(r1 / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in pushed.items()} == TargetFiles.read(str(r1)).shapes
    coded = coded_names(pushed)
    assert coded == coded_names(stored) - {name for name in stored if name.startswith("model.layers.4.")}
    for name in coded:  # of numbers in bfloat16: the same codes, scales within its rounding
        assert torch.equal(pushed[name].float(), stored[name].float()), name
        torch.testing.assert_close(pushed[name + "_scale_inv"], stored[name + "_scale_inv"], rtol=2**-8, atol=0)


@pytest.mark.parametrize("layout", ["one rank", "TP2 EP2", "PP2"])
def test_an_export_has_numbers_and_says_so_and_transformers_loads_it(layout: str, r1: Path, tmp_path: Path) -> None:
    target, laid_out = tmp_path / "export", LAYOUTS[layout]
    config = tiny_config(r1, {**laid_out, "dtype": "bfloat16"})
    run_ranks(config.trainer.world_size, "export", config, str(target))
    written = json.loads((target / "config.json").read_text())
    assert "quantization_config" not in written
    assert written["dtype"] == "bfloat16"
    source = json.loads((r1 / "config.json").read_text())
    assert source.keys() - written.keys() == {"quantization_config"}
    wanted, headers = numbers_of(r1), CheckpointFolder(target).tensors
    assert headers.keys() == wanted.keys()
    assert {each.dtype for name, each in headers.items() if BIAS not in name} == {"bfloat16"}
    exported = load_tensors(target, ModelSpec.from_folder(target))
    for name, tensor in exported.items():
        assert torch.equal(tensor, wanted[name] if BIAS in name else wanted[name].bfloat16()), name
    tokens, numbers = torch.arange(20)[None], store_numbers(r1, tmp_path / "numbers")
    rounded = {name: each if BIAS in name else each.bfloat16().float() for name, each in wanted.items()}
    save_file(rounded, numbers / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        assert torch.equal(load_reference(target)(tokens).logits, load_reference(numbers)(tokens).logits)


def test_a_step_from_fp8_is_the_step_from_its_numbers(r1: Path, tmp_path: Path) -> None:
    numbers = store_numbers(r1, tmp_path / "numbers")
    (of_fp8,), (of_numbers,) = (
        run_ranks(1, "train", tiny_config(folder), [tiny_samples(1), tiny_samples(2)]) for folder in (r1, numbers)
    )
    assert of_fp8[1] == of_numbers[1]
    assert all(torch.equal(tensor, of_numbers[2][name]) for name, tensor in of_fp8[2].items())
