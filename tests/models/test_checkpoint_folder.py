"""The one reader of a checkpoint folder: config.json and headers, without a byte of weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.end_of_text import end_token_ids
from slime_spec.checkpoints.folder import CheckpointFolder, StoredTensor
from slime_spec.checkpoints.model_files import TargetFiles
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.parameters import count_parameters, kv_elements_per_token
from slime_spec.checkpoints.stored import Checkpoint
from slime_spec.errors import CheckpointError

TARGET = {
    **{"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16},
    **{"num_attention_heads": 2, "vocab_size": 9, "max_position_embeddings": 32, "rms_norm_eps": 1e-5},
}


def test_the_headers_of_all_shards_are_the_tensors_that_were_saved(tmp_path: Path) -> None:
    first = {"a": torch.zeros(3, 5, dtype=torch.bfloat16), "ids": torch.zeros(7, dtype=torch.int64)}
    second = {"b": torch.zeros(2, dtype=torch.float32)}
    save_file(first, tmp_path / "one.safetensors")
    save_file(second, tmp_path / "two.safetensors")
    places = {**dict.fromkeys(first, "one.safetensors"), **dict.fromkeys(second, "two.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.read(str(tmp_path))
    assert checkpoint.tensors is not None
    for name, tensor in {**first, **second}.items():
        stored = checkpoint.tensors[name]
        assert stored.shape == tuple(tensor.shape)
        assert stored.num_bytes == tensor.numel() * tensor.element_size()
    assert checkpoint.tensors["a"].dtype == "bfloat16"
    assert checkpoint.num_bytes == 30 + 56 + 8


@pytest.mark.parametrize(
    ("config", "dtype"),
    [({"torch_dtype": "float16"}, "float16"), ({"dtype": "bfloat16"}, "bfloat16"), ({}, "float32")],
)
def test_the_dtype_is_the_configs_and_else_that_of_most_bytes(config, dtype, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(9), "b": torch.zeros(2, dtype=torch.float16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Checkpoint.read(str(tmp_path)).dtype == dtype


def test_a_folder_with_config_json_alone_is_enough_for_a_plan(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert Checkpoint.read(str(tmp_path)).tensors is None


def test_a_file_that_is_cut_in_its_header_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(9)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:20])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="whole safetensors file"):
        Checkpoint.read(str(tmp_path))


def test_a_folder_without_config_json_is_refused_with_the_setting_that_named_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as refused:
        Checkpoint.read(str(tmp_path), "speculative.draft_model_path")
    assert refused.value.setting == "speculative.draft_model_path"


def test_a_file_that_is_cut_behind_its_header_is_refused_too(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(9)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=f"whole safetensors file of {len(whole)} bytes"):
        CheckpointFolder(tmp_path).tensors  # noqa: B018 - reading it is what raises


def test_a_shard_that_is_not_there_is_named_to_an_engine_and_left_out_of_a_plan(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(9)}, tmp_path / "one.safetensors")
    places = {"a": "one.safetensors", "b": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (tmp_path / "config.json").write_text("{}")
    assert Checkpoint.read(str(tmp_path)).tensors == {"a": StoredTensor("float32", (9,), 36)}
    with pytest.raises(CheckpointError, match=r"lacks two\.safetensors"):
        CheckpointFolder(tmp_path).tensors  # noqa: B018 - reading it is what raises


def test_a_folder_that_is_not_there_is_refused_as_no_folder_whatever_is_read_first() -> None:
    """Users would look for weights in a folder whose path they mistyped."""
    for name in ("config", "weight_files", "tensors"):
        with pytest.raises(CheckpointError, match=r"must be a checkpoint folder with a config\.json") as refused:
            getattr(CheckpointFolder(Path("/no/such/folder"), "model.hf_checkpoint"), name)
        assert refused.value.setting == "model.hf_checkpoint"


@pytest.mark.parametrize(("text", "rule"), [("{", "must be valid JSON"), ("[1]", "must be a JSON object")])
def test_every_view_refuses_a_damaged_config_in_the_same_words(text: str, rule: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    target = ModelSpec.from_dict(TARGET)
    views = (
        lambda: Checkpoint.read(str(tmp_path)),
        lambda: TargetFiles.read(str(tmp_path)),
        lambda: ModelSpec.from_folder(tmp_path),
        lambda: DraftSpec.from_folder(tmp_path, target),
    )
    for view in views:
        with pytest.raises(CheckpointError, match=rule) as refused:
            view()
        assert refused.value.setting == str(tmp_path / "config.json")


def test_the_language_model_of_a_multimodal_checkpoint_is_read_at_the_top(tmp_path: Path) -> None:
    text = {"model_type": "inner", "vocab_size": 7, "eos_token_id": [1, 2]}
    config = {
        "model_type": "outer",
        "architectures": ["Outer"],
        "vocab_size": 9,
        "text_config": text,
        "eos_token_id": 4,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3}')
    folder = CheckpointFolder(tmp_path)
    assert (folder.config["model_type"], folder.config["vocab_size"]) == ("outer", 7)
    assert folder.architecture == "Outer"
    assert end_token_ids(tmp_path) == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", "LlamaForCausalLM"),
        ("architectures", [["LlamaForCausalLM"]]),
        ("text_config", [1]),
        ("model_type", {}),
        ("vocab_size", float("inf")),
        ("num_hidden_layers", 10**9),
        ("num_labels", 10**9),
        ("num_attention_heads", [4, "4"]),
        ("num_key_value_heads", -1),
        ("kv_lora_rank", "512"),
        ("n_routed_experts", True),
        ("mlp_only_layers", [1.5]),
        ("eagle_config", "x" * 100_000),
        ("eagle_config.eagle_aux_hidden_state_layer_ids", [0, "/"]),
        ("quantization_config", [{"a": [{}] * 1000}]),
        ("tie_word_embeddings", "false"),
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "DeepseekV3ForCausalLM"])
def test_a_key_of_another_kind_is_refused_for_every_family_and_shown_shortly(
    architecture: str, key: str, value: object, tmp_path: Path
) -> None:
    outer, _, inner = key.partition(".")
    changes = {outer: {inner: value} if inner else value}
    (tmp_path / "config.json").write_text(json.dumps({**TARGET, "architectures": [architecture], **changes}))
    with pytest.raises(CheckpointError) as refused:
        Checkpoint.read(str(tmp_path))
    assert refused.value.setting == f"{tmp_path / 'config.json'}: {key}"
    assert len(str(refused.value)) < 400


def test_a_config_json_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="must be at most 100000000 bytes long"):
        Checkpoint.read(str(tmp_path))


def test_a_model_without_sizes_for_every_part_is_not_counted() -> None:
    sizes = {**TARGET, "num_key_value_heads": 2}
    assert count_parameters(sizes) is not None
    assert count_parameters({**sizes, "num_key_value_heads": [1, 2]}) is None
    assert count_parameters({**sizes, "num_attention_heads": 0}) is None
    assert count_parameters({**sizes, "kv_lora_rank": 8}) is None
    assert kv_elements_per_token({**sizes, "head_dim": [4]}) is None
