"""Stored tensors are the numbers that are computed with, or the checkpoint is refused before anything starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slime_spec.checkpoints.folder import CheckpointFolder
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import load_tensors, verify_tensors
from slime_spec.config.tree import Config, EngineConfig, ModelConfig, RolloutConfig, RunConfig
from slime_spec.errors import CheckpointError
from slime_spec.launch.compose import Composed
from slime_spec.launch.preflight import Inputs, look
from tests.support.tiny_drafts import edit_config, edit_tensors
from tests.support.tiny_models import make_tiny_checkpoint
from tests.support.tiny_policy import make_tiny_policy

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return make_tiny_policy(tmp_path / "policy")


def quantised(folder: Path, to_codes: Callable[[torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]) -> Path:
    """Store every projection as codes and what belongs to them."""
    tensors: Tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("proj.weight"):
            tensors[name], scales = to_codes(tensor)
            tensors |= {name + end: scale for end, scale in scales.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), {"_scale": scale}


def to_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
    return weight.to(torch.float8_e4m3fn), {"_scale_inv": torch.ones(1, 1)}


CODES = {"int8": to_int8, "float8_e4m3fn": to_fp8}
SCHEMES: dict[str, dict[str, Any]] = {
    "int8": {"quant_method": "compressed-tensors", "format": "int-quantized"},
    "float8_e4m3fn": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


def launch_of(folder: Path, **run: Any) -> Config:
    return Config(model=ModelConfig(str(folder)), rollout=RolloutConfig(max_prompt_len=200, **run))


def preflight(config: Config) -> Inputs:
    """Check as a launch does."""
    return look(Composed(config, (), frozenset())).checked()


@pytest.mark.parametrize("codes", CODES)
def test_quantised_weights_are_refused_by_their_scheme(codes: str, policy: Path) -> None:
    """Case audit/05: int8 weights were loaded as their codes."""
    edit_config(quantised(policy, CODES[codes]), quantization_config=SCHEMES[codes])
    with pytest.raises(CheckpointError) as refused:
        preflight(launch_of(policy))
    assert refused.value.setting.endswith("config.json: quantization_config")


@pytest.mark.parametrize("codes", CODES)
def test_quantised_weights_that_nothing_announces_are_refused_by_their_first_tensor(codes: str, policy: Path) -> None:
    """Case audit/05, without the key of config.json."""
    spec = ModelSpec.from_folder(policy)
    quantised(policy, CODES[codes])
    with pytest.raises(CheckpointError, match="quantised weights"):
        load_tensors(policy, spec)
    kept = {name: tensor for name, tensor in load_file(policy / "model.safetensors").items() if "_scale" not in name}
    save_file(kept, policy / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"must be float32, float16 or bfloat16.*got '{codes}'"):
        load_tensors(policy, spec)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e5m2])
def test_a_tensor_of_another_dtype_is_refused_by_name(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model")
    edit_tensors(folder, model__norm__weight=torch.ones(48).to(dtype))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: must be float32, float16 or bfloat16"):
        verify_tensors(folder, ModelSpec.from_folder(folder))


def test_scales_beside_float_weights_are_refused(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model")
    name = "model__layers__0__mlp__up_proj__weight_scale"
    edit_tensors(folder, **{name: torch.ones(96)})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_scale: belongs to quantised weights"):
        verify_tensors(folder, ModelSpec.from_folder(folder))


def test_sglang_goes_on_to_serve_quantised_weights_in_rollouts_alone(policy: Path) -> None:
    edit_config(quantised(policy, to_fp8), quantization_config=SCHEMES["float8_e4m3fn"])
    config = launch_of(policy, engine="sglang")
    skipped = ("sglang-version", "push-quantization")
    alone, trained = (RunConfig(mode=mode, skip_checks=skipped) for mode in ("rollout_only", "train"))
    engine = EngineConfig(dtype="bfloat16")  # SGLang computes with fp8 in 16 bits alone
    assert preflight(Config(model=config.model, rollout=config.rollout, run=alone, engine=engine)).spec is None
    with pytest.raises(CheckpointError, match="quantization_config"):  # the trainer would have to compute with them
        preflight(replace(config, run=trained, engine=engine))


@pytest.mark.parametrize(
    ("value", "rule"), [(float("nan"), "must be finite"), (float("-inf"), "must be finite"), (-1e36, "at most 1e\\+15")]
)
def test_a_number_that_a_forward_pass_overflows_on_is_refused_by_its_tensor(
    value: float, rule: str, tmp_path: Path
) -> None:
    """One flipped bit of an exponent makes 1e36, and NaN of every logit."""
    folder = make_tiny_checkpoint(tmp_path / "model")
    norm = torch.ones(48)
    norm[3] = value
    edit_tensors(folder, model__norm__weight=norm)
    with pytest.raises(CheckpointError, match=rf"model\.norm\.weight: must .*{rule}|norm\.weight: {rule}"):
        load_tensors(folder, ModelSpec.from_folder(folder))


def test_a_weight_that_is_infinite_in_the_engines_dtype_is_refused_before_it_starts(policy: Path) -> None:
    edit_tensors(policy, model__norm__weight=torch.full((48,), 70_000.0))
    preflight(launch_of(policy))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: must be finite in float16") as refused:
        preflight(replace(launch_of(policy), engine=EngineConfig(dtype="float16")))
    assert refused.value.value == 70_000.0


def test_a_head_beside_a_tied_embedding_is_the_embedding_or_refused(tmp_path: Path) -> None:
    """Transformers computes with the head that is stored, whatever tie_word_embeddings says."""
    folder = make_tiny_checkpoint(tmp_path / "model", tie_word_embeddings=True)
    spec = ModelSpec.from_folder(folder)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(folder, lm_head__weight=embedding.clone())
    verify_tensors(folder, spec)
    edit_tensors(folder, lm_head__weight=embedding + 1)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: must be model\.embed_tokens\.weight"):
        verify_tensors(folder, spec)


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a model.safetensors, and keep the bytes behind it."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


NORM = "model.norm.weight"
HEADER_LIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "overlapping": lambda header: header[NORM].update(data_offsets=header["lm_head.weight"]["data_offsets"]),
    "negative": lambda header: header[NORM].update(data_offsets=[-192, 0]),
    "backwards": lambda header: header[NORM].update(data_offsets=header[NORM]["data_offsets"][::-1]),
    "huge": lambda header: header[NORM].update(data_offsets=[0, 2**60], shape=[2**58]),
    "digits": lambda header: header[NORM].update(shape=[10**4000]),
    "fractions": lambda header: header[NORM].update(shape=[48.0]),
    "a shape of other bytes": lambda header: header[NORM].update(shape=[47]),
    "a dtype of other bytes": lambda header: header[NORM].update(dtype="F16"),
    "no dtype": lambda header: header[NORM].update(dtype=None),
    "no offsets": lambda header: header[NORM].pop("data_offsets"),
    "three offsets": lambda header: header[NORM]["data_offsets"].append(0),
    "no entry": lambda header: header.update({NORM: None}),
    "many dimensions": lambda header: header[NORM].update(shape=[48] + [1] * 100_000),
}


@pytest.mark.parametrize("lie", HEADER_LIES)
def test_a_header_that_lies_is_one_error(lie: str, tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model")
    spec = ModelSpec.from_folder(folder)
    rewritten(folder, HEADER_LIES[lie])
    for read in (lambda: CheckpointFolder(folder).tensors, lambda: load_tensors(folder, spec)):
        with pytest.raises(CheckpointError, match="must be a whole safetensors file"):
            read()


@pytest.mark.parametrize(
    "place", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "a\0", "", 3, None, [], {}]
)
def test_an_index_names_files_of_its_own_folder_alone(place: object, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": place}}))
    for read in ("weight_files", "tensors_there"):
        with pytest.raises(CheckpointError, match=r"must name \.safetensors files of this folder") as refused:
            getattr(CheckpointFolder(tmp_path / "model"), read)
        assert refused.value.setting == str(index)


def test_a_name_that_is_too_long_for_a_file_is_a_file_that_is_missing(tmp_path: Path) -> None:
    place = "x" * 5000 + ".safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": place}}))
    assert CheckpointFolder(tmp_path).tensors_there is None
    with pytest.raises(CheckpointError, match="lacks xxx"):
        CheckpointFolder(tmp_path).tensors  # noqa: B018 - reading it is what raises


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for shard in ("one", "two"):
        save_file({"a": torch.zeros(3)}, tmp_path / f"{shard}.safetensors")
    places = {"a": "one.safetensors", "b": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match=r"two\.safetensors: a: must be in one file alone"):
        CheckpointFolder(tmp_path).tensors  # noqa: B018 - reading it is what raises


def test_a_file_that_is_no_file_is_missing(tmp_path: Path) -> None:
    """A folder, or a link to itself, in the place of a file."""
    (tmp_path / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"must be a checkpoint folder with a config\.json"):
        CheckpointFolder(tmp_path).config  # noqa: B018 - reading it is what raises
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"must hold model\.safetensors"):
        CheckpointFolder(tmp_path).tensors  # noqa: B018 - reading it is what raises
