"""A GGUF file becomes the Hugging Face checkpoint it was made from."""

from __future__ import annotations

from pathlib import Path
from random import Random

import gguf
import numpy as np
import pytest
import torch
from tiny_llama import KV_HEADS, llama_cpp_rows, write_gguf
from transformers import LlamaForCausalLM

from slime_spec.bench.robustness.damage import in_bytes
from slime_spec.checkpoints.gguf import GgufModel, halves_from_pairs
from slime_spec.checkpoints.tensors import save_checkpoint
from slime_spec.errors import CheckpointError


def test_a_converted_gguf_file_gives_the_logits_of_the_model_it_was_written_from(
    tmp_path: Path, tiny_gguf: Path, tiny_llama: LlamaForCausalLM
) -> None:
    source = GgufModel(tiny_gguf)
    save_checkpoint(tmp_path / "hf", source.tensors(), source.config())
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, tiny_llama(ids).logits, rtol=0, atol=0)


def test_without_restoring_the_row_order_of_q_and_k_the_logits_differ(
    tmp_path: Path, tiny_gguf: Path, tiny_llama: LlamaForCausalLM
) -> None:
    source = GgufModel(tiny_gguf)
    tensors = dict(source.tensors())
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = torch.from_numpy(llama_cpp_rows(tensors[name].numpy(), KV_HEADS))
    save_checkpoint(tmp_path / "hf", tensors.items(), source.config())
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        assert (loaded(ids).logits - tiny_llama(ids).logits).abs().max() > 1e-3


def test_restoring_the_row_order_undoes_llama_cpps_one() -> None:
    rows = np.arange(3 * 8 * 5, dtype=np.float32).reshape(24, 5)
    np.testing.assert_array_equal(halves_from_pairs(llama_cpp_rows(rows, 3), 3), rows)


def test_float32_metadata_reads_back_as_the_decimals_that_were_meant(tiny_gguf: Path) -> None:
    config = GgufModel(tiny_gguf).config()
    assert (config["rms_norm_eps"], config["rope_theta"], config["tie_word_embeddings"]) == (1e-5, 5000.0, True)


def test_the_tokenizer_splits_digits_and_merges_as_the_file_says(tiny_gguf: Path) -> None:
    bpe, config = GgufModel(tiny_gguf).tokenizer()
    assert bpe.encode("<|im_start|>he 12").tokens == ["<|im_start|>", "he", "Ġ", "1", "2"]
    assert bpe.decode(bpe.encode("naïve 日本 🎉 12").ids) == "naïve 日本 🎉 12"
    assert config["eos_token"] == "<|im_end|>"


def test_a_truncated_file_is_refused_by_name(tiny_gguf: Path) -> None:
    tiny_gguf.write_bytes(tiny_gguf.read_bytes()[: tiny_gguf.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: must be a whole GGUF file"):
        GgufModel(tiny_gguf)


def test_a_file_that_is_no_gguf_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "notes.gguf").write_bytes(b"these are notes, not weights" * 10)
    with pytest.raises(CheckpointError, match=r"notes\.gguf: must be a whole GGUF file"):
        GgufModel(tmp_path / "notes.gguf")


def test_another_architecture_is_refused(tmp_path: Path, tiny_llama: LlamaForCausalLM) -> None:
    path = write_gguf(tmp_path / "other.gguf", tiny_llama, architecture="gemma")
    with pytest.raises(CheckpointError, match=r"general\.architecture must be llama"):
        GgufModel(path)


def test_a_missing_key_and_a_foreign_tensor_are_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "bare.gguf", "llama")
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_tensor("blk.0.ssm_in.weight", np.zeros((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GgufModel(tmp_path / "bare.gguf")
    with pytest.raises(CheckpointError, match=r"llama\.embedding_length"):
        source.config()
    with pytest.raises(CheckpointError, match="ssm_in"):
        list(source.tensors())


def test_a_damaged_file_is_read_or_is_one_error(tmp_path: Path, tiny_gguf: Path) -> None:
    whole = tiny_gguf.read_bytes()
    refused = 0
    for seed in range(150):
        what, head = in_bytes(whole[:6000], Random(f"gguf {seed}"))
        path = tmp_path / "damaged.gguf"
        path.write_bytes(head + whole[6000:])
        try:
            source = GgufModel(path)
            assert source.config()["num_hidden_layers"], what
            assert [*source.tensors()], what
            source.tokenizer()
        except CheckpointError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("key", "value"), [("rope.dimension_count", 4), ("rope.scaling.factor", 8), ("expert_count", 2)]
)
def test_a_key_of_another_decoder_is_refused_by_name(tmp_path: Path, key: str, value: int) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.add_embedding_length(32)
    writer.add_head_count(4)
    writer.add_uint32(f"llama.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=rf"llama\.{key} must be"):
        GgufModel(tmp_path / "other.gguf").config()
