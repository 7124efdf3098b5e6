"""Hugging Face -> Megatron -> Hugging Face, for every family, whole and through shards."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import expected_shapes
from tests.trainer.trainer_support import make_policy
from trainer_bridge.megatron import names


def megatron_names(spec: ModelSpec) -> Iterable[str]:
    yield "embedding.word_embeddings.weight"
    for layer in range(spec.num_layers):
        for kind in names.LAYER_NAMES:
            if ("bias" not in kind or spec.qkv_bias) and ("_layernorm" not in kind.split(".")[1] or spec.qk_norm):
                yield f"decoder.layers.{layer}.{kind}"
    yield "decoder.final_layernorm.weight"
    if not spec.tie_word_embeddings:
        yield "output_layer.weight"


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_tensor_comes_back_bit_for_bit(architecture: str, tied: bool, num_ranks: int, tmp_path: Path) -> None:
    spec = ModelSpec.from_folder(make_policy(tmp_path, architecture, tied))
    tensors = {name: torch.randn(shape) for name, shape in expected_shapes(spec).items()}
    back = {}
    for name in megatron_names(spec):
        whole = names.from_hf(name, tensors, spec)
        shards = [names.shard(name, whole, rank, num_ranks) for rank in range(num_ranks)]
        assert names.is_sharded(name) == (num_ranks > 1 and shards[0].numel() < whole.numel()) or num_ranks == 1
        back |= dict(names.to_hf(name, names.unshard(name, shards), spec))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor), name


def test_each_tensor_rank_holds_whole_heads_with_their_own_keys_and_values(tmp_path: Path) -> None:
    spec = ModelSpec.from_folder(make_policy(tmp_path))
    tensors = {
        f"model.layers.0.self_attn.{x}_proj.weight": torch.full((heads * spec.head_dim, 1), float(value))
        for x, heads, value in (("q", spec.num_heads, 0), ("k", spec.num_kv_heads, 1), ("v", spec.num_kv_heads, 2))
    }
    for x in "qkv":
        weight = tensors[f"model.layers.0.self_attn.{x}_proj.weight"]
        weight += 10.0 * torch.arange(len(weight) // spec.head_dim).repeat_interleave(spec.head_dim)[:, None]
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    shard = names.shard(name, names.from_hf(name, tensors, spec), 1, 2)
    # Rank 1 of 2: query heads 2 and 3 with key-value head 1.
    assert shard[:: spec.head_dim, 0].tolist() == [20.0, 30.0, 11.0, 12.0]


def test_a_stage_numbers_its_layers_from_zero() -> None:
    assert names.global_name("decoder.layers.1.mlp.linear_fc2.weight", 2) == "decoder.layers.3.mlp.linear_fc2.weight"
    assert names.global_name("decoder.final_layernorm.weight", 2) == "decoder.final_layernorm.weight"


def test_a_tied_output_layer_is_the_embedding(tmp_path: Path) -> None:
    spec = ModelSpec.from_folder(make_policy(tmp_path, tied=True))
    assert names.hf_names("output_layer.weight", spec) == ("model.embed_tokens.weight",)
