"""Weights in fp8 with a scale for each block are the numbers that a plain loop over the blocks makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import load_draft, verify_draft
from slime_spec.checkpoints.fp8 import dequantised, has_nan, quantised
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.quantization import BlockScheme, coded_names, scheme_of
from slime_spec.checkpoints.stored import Checkpoint
from slime_spec.checkpoints.tensors import load_tensors, verify_headers, verify_tensors
from slime_spec.errors import CheckpointError, NotComputedError
from tests.support.fp8_checkpoints import (
    PUBLISHED,
    dequantised_by_loop,
    is_linear,
    numbers_of,
    quantised_by_loop,
    store_in_fp8,
)
from tests.support.tiny_models import add_mtp_layer, make_tiny_checkpoint

SHAPES = [((128, 128), (128, 128)), ((300, 200), (128, 128)), ((5, 7), (128, 128)), ((33, 50), (16, 8))]
UP = "model.layers.0.mlp.up_proj.weight"


def drawn(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Numbers of very different sizes, as rows of weights have them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** torch.empty(shape[0], 1).uniform_(-4, 2, generator=generator)
    return torch.randn(shape, generator=generator) * sizes


@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_codes_and_scales_are_those_of_a_loop_over_the_blocks(shape: tuple[int, int], block: tuple[int, int]) -> None:
    weight, scheme = drawn(shape), BlockScheme(*block)
    codes, scales = quantised(weight, scheme)
    by_loop = quantised_by_loop(weight, block)
    assert tuple(scales.shape) == tuple(by_loop[1].shape) == scheme.scale_shape(shape)
    torch.testing.assert_close(scales, by_loop[1], rtol=1e-7, atol=0)
    assert torch.equal(codes.float(), by_loop[0].float())
    assert torch.equal(dequantised(codes, scales, scheme), dequantised_by_loop(codes, scales, block))


@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_a_number_comes_back_within_half_a_step_of_e4m3(shape: tuple[int, int], block: tuple[int, int]) -> None:
    """Three bits after the leading one: half a step is a 16th of the number, and below 2^-6 scales 2^-10 of a scale."""
    weight, scheme = drawn(shape), BlockScheme(*block)
    codes, scales = quantised(weight, scheme)
    error = (dequantised(codes, scales, scheme) - weight).abs()
    scale = dequantised(torch.ones_like(codes, dtype=torch.float32).to(torch.float8_e4m3fn), scales, scheme)
    bound = torch.maximum(weight.abs() / 16, scale / 1024) * (1 + 2**-20)  # fp32 rounds twice
    assert (error <= bound).all()
    assert (error > bound / 2).any()


def test_what_was_in_fp8_has_the_same_codes_again_and_the_same_numbers_where_its_scales_are_the_same() -> None:
    """Where a block has the largest code, its scale comes back to one unit in the last place: 448 s / 448 is rounded.

    A code is then at most 2^-22 of itself from where it was, which no rounding to three bits moves.
    """
    scheme = BlockScheme(128, 128)
    codes, scales = quantised(drawn((700, 900)), scheme)
    weight = dequantised(codes, scales, scheme)
    again, new_scales = quantised(weight, scheme)
    assert torch.equal(again.float(), codes.float())
    torch.testing.assert_close(new_scales, scales, rtol=2**-22, atol=0)
    is_same = dequantised(torch.ones(700, 900).to(torch.float8_e4m3fn), (new_scales == scales).float(), scheme).bool()
    assert is_same.any()
    assert torch.equal(dequantised(again, new_scales, scheme)[is_same], weight[is_same])
    # Of numbers in bfloat16, as a trainer has them, the codes are the same as well, and scales move by its rounding.
    of_bfloat16, moved = quantised(weight.bfloat16(), scheme)
    assert torch.equal(of_bfloat16.float(), codes.float())
    torch.testing.assert_close(moved, scales, rtol=2**-8, atol=0)


def test_a_block_without_its_largest_code_is_rounded_anew_within_the_bound() -> None:
    scheme = BlockScheme(4, 4)
    codes, scales = torch.linspace(-20, 20, 16).view(4, 4).to(torch.float8_e4m3fn), torch.tensor([[0.3]])
    weight = dequantised(codes, scales, scheme)
    again, new_scales = quantised(weight, scheme)
    assert new_scales.item() == pytest.approx(20 * 0.3 / 448)
    error = (dequantised(again, new_scales, scheme) - weight).abs()
    assert (error <= torch.maximum(weight.abs() / 16, new_scales / 1024) * (1 + 2**-20)).all()
    assert (error > 0).any()


def test_blocks_of_zeros_and_of_the_least_numbers_have_finite_codes() -> None:
    least = torch.finfo(torch.float32).smallest_normal
    weight = torch.cat([torch.zeros(4, 4), torch.full((4, 4), least), torch.full((4, 4), least / 2**20)])
    codes, scales = quantised(weight, BlockScheme(4, 4))
    assert not has_nan(codes)
    assert (scales >= least).all()
    assert torch.equal(codes[:4].float(), torch.zeros(4, 4))
    assert has_nan(torch.tensor([float("nan")]).to(torch.float8_e4m3fn))
    assert not has_nan(torch.tensor([448.0, -448.0, 0.0]).to(torch.float8_e4m3fn))


@pytest.fixture
def r1(tmp_path: Path) -> Path:
    """A DeepSeek-V3 with its MTP layer in fp8; no size is a multiple of the blocks'."""
    return store_in_fp8(add_mtp_layer(make_tiny_checkpoint(tmp_path / "r1", "DeepseekV3ForCausalLM")), (32, 20))


def test_a_checkpoint_in_fp8_is_loaded_as_the_numbers_that_it_stands_for(r1: Path) -> None:
    spec, wanted = ModelSpec.from_folder(r1), numbers_of(r1)
    verify_tensors(r1, spec, dtypes=[torch.bfloat16])
    loaded = load_tensors(r1, spec)
    stored = load_file(r1 / "model.safetensors")
    assert any(tensor.dtype == torch.float8_e4m3fn for tensor in stored.values())
    for name, tensor in loaded.items():
        assert torch.equal(tensor, wanted[name]), name
    draft = DraftSpec.from_folder(r1, spec)
    verify_draft(r1, draft)
    layer = load_draft(r1, draft).tensors
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in layer.items())
    assert sum(is_linear(name) for name in layer) > 10
    assert {name for name in coded_names(stored) if not is_linear(name)} == set()


def test_a_weights_scales_may_be_in_another_file(r1: Path) -> None:
    spec, wanted = ModelSpec.from_folder(r1), numbers_of(r1)
    stored = load_file(r1 / "model.safetensors")
    (r1 / "model.safetensors").unlink()
    places = {name: "b.safetensors" if name.endswith("_scale_inv") else "a.safetensors" for name in stored}
    for file in ("a.safetensors", "b.safetensors"):
        save_file({name: stored[name] for name in stored if places[name] == file}, r1 / file)
    (r1 / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in load_tensors(r1, spec).items())


def test_codes_say_nothing_of_the_dtype_that_a_checkpoint_is_for(r1: Path) -> None:
    """Without a dtype in config.json, that of most bytes: of codes it is not known."""
    config = json.loads((r1 / "config.json").read_text())
    (r1 / "config.json").write_text(json.dumps({**config, "dtype": None}))
    assert Checkpoint.read(str(r1)).dtype == "float32"


OTHER_SCHEMES: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"quant_method": "gptq"}, "quant_method"),
    "no method": ({"quant_method": None}, "quant_method"),
    "another format": ({"fmt": "e5m2"}, "fmt"),
    "no blocks": ({"weight_block_size": None}, "weight_block_size"),
    "blocks of nothing": ({"weight_block_size": [0, 128]}, "weight_block_size"),
    "blocks of one dimension": ({"weight_block_size": [128]}, "weight_block_size"),
    "blocks by a word": ({"weight_block_size": "128"}, "weight_block_size"),
    "static activations": ({"activation_scheme": "static"}, "activation_scheme"),
    "scales of eight bits": ({"scale_fmt": "ue8m0"}, "scale_fmt"),
    "a cache in fp8": ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
}


@pytest.mark.parametrize("other", OTHER_SCHEMES)
def test_any_other_way_to_quantise_weights_is_refused_by_its_key(other: str, r1: Path) -> None:
    changed, key = OTHER_SCHEMES[other]
    config = json.loads((r1 / "config.json").read_text())
    (r1 / "config.json").write_text(json.dumps({**config, "quantization_config": {**PUBLISHED, **changed}}))
    with pytest.raises(NotComputedError, match=rf"config\.json: quantization_config: .*{key}") as refused:
        ModelSpec.from_folder(r1)
    assert "--debug-rollout-only" in refused.value.remedy


def test_which_layers_are_not_converted_is_read_from_the_tensors() -> None:
    described = {**PUBLISHED, "modules_to_not_convert": ["lm_head"]}
    assert scheme_of({"quantization_config": described}, "config.json") == BlockScheme(128, 128)


Change = Callable[[dict[str, torch.Tensor]], Any]
DAMAGED: dict[str, tuple[Change, str]] = {
    "a weight without scales": (lambda own: own.pop(UP + "_scale_inv"), r"up_proj\.weight_scale_inv: must be in the"),
    "scales without a weight": (
        lambda own: own.update({"model.layers.9.mlp.up_proj.weight_scale_inv": torch.ones(1, 1)}),
        r"layers\.9\.mlp\.up_proj\.weight_scale_inv: must belong to a weight in fp8.*no such tensor",
    ),
    "scales beside numbers": (
        lambda own: own.update({UP: own[UP].float()}),
        r"up_proj\.weight_scale_inv: must belong to a weight in fp8.*float32",
    ),
    "scales of another shape": (
        lambda own: own.update({UP + "_scale_inv": torch.ones(1, 1)}),
        r"up_proj\.weight_scale_inv: must have shape \(3, 3\), a scale for each block of 32 x 20",
    ),
    "scales of another dtype": (
        lambda own: own.update({UP + "_scale_inv": torch.ones(3, 3).bfloat16()}),
        r"up_proj\.weight_scale_inv: must be float32",
    ),
    "a vector in fp8": (
        lambda own: own.update({"model.norm.weight": torch.ones(48).to(torch.float8_e4m3fn)}),
        r"model\.norm\.weight: must be a matrix",
    ),
    "parts of another scheme": (
        lambda own: own.update({"model.layers.0.mlp.up_proj.qzeros": torch.ones(3)}),
        r"up_proj\.qzeros: belongs to quantised weights",
    ),
    "another shape": (
        lambda own: own.update({UP: own[UP][:65].contiguous()}),
        r"up_proj\.weight: must have shape \(96, 48\)",
    ),
}
WRONG_NUMBERS: dict[str, tuple[Change, str]] = {
    "a code that is no number": (
        lambda own: own[UP].view(torch.uint8).__setitem__((3, 5), 0xFF),
        r"up_proj\.weight: must be finite",
    ),
    "a scale that is no number": (
        lambda own: own[UP + "_scale_inv"].__setitem__((0, 0), torch.nan),
        r"up_proj\.weight: must be finite",
    ),
    "an infinite scale": (
        lambda own: own[UP + "_scale_inv"].__setitem__((0, 0), torch.inf),
        r"up_proj\.weight: must be finite",
    ),
    "a scale that a pass overflows on": (
        lambda own: own[UP + "_scale_inv"].__setitem__((0, 0), 1e30),
        r"up_proj\.weight: must hold numbers of at most 1e\+15",
    ),
}


def damage(folder: Path, change: Change) -> ModelSpec:
    spec, stored = ModelSpec.from_folder(folder), load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return spec


@pytest.mark.parametrize("damaged", DAMAGED)
def test_codes_and_scales_that_do_not_fit_each_other_are_refused_by_name_from_their_headers(
    damaged: str, r1: Path
) -> None:
    change, told = DAMAGED[damaged]
    spec = damage(r1, change)
    for read in (load_tensors, verify_tensors, verify_headers):
        with pytest.raises(CheckpointError, match=told):
            read(r1, spec)


@pytest.mark.parametrize("wrong", WRONG_NUMBERS)
def test_codes_and_scales_that_are_no_numbers_are_refused_by_name(wrong: str, r1: Path) -> None:
    change, told = WRONG_NUMBERS[wrong]
    spec = damage(r1, change)
    with pytest.raises(CheckpointError, match=told):
        verify_tensors(r1, spec)
    verify_headers(r1, spec)


def test_a_weight_that_is_infinite_in_float16_is_refused_for_such_an_engine_alone(r1: Path) -> None:
    spec = damage(r1, lambda own: own[UP + "_scale_inv"].fill_(200.0))
    verify_tensors(r1, spec, dtypes=[torch.bfloat16])
    with pytest.raises(CheckpointError, match=r"up_proj\.weight: must be finite in float16"):
        verify_tensors(r1, spec, dtypes=[torch.float16])


def test_a_draft_in_a_folder_of_its_own_is_not_read_from_fp8(r1: Path) -> None:
    target = ModelSpec.from_folder(r1)
    head = {
        **{"architectures": ["LlamaForCausalLMEagle3"], "hidden_size": 48, "intermediate_size": 96},
        **{"num_hidden_layers": 1, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 131},
        **{"max_position_embeddings": 512, "rms_norm_eps": 1e-5, "quantization_config": PUBLISHED},
    }
    with pytest.raises(NotComputedError, match="quantization_config: must be left out: of drafts"):
        DraftSpec.from_dict(head, target)
