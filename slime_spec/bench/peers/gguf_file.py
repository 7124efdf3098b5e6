"""Write a Hugging Face checkpoint as a bf16 GGUF file without a vocabulary, for llama.cpp on token ids."""

from __future__ import annotations

from pathlib import Path

import torch

from slime_spec.checkpoints.families.llama import LLAMA
from slime_spec.checkpoints.gguf import LAYER_NAMES, TOP_NAMES
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import load_tensors
from slime_spec.errors import ConfigError

GGUF_OF_TOP = {name: stored for stored, name in TOP_NAMES.items()}
GGUF_OF_LAYER = {name: stored for stored, name in LAYER_NAMES.items()}


def write_gguf(checkpoint: Path, path: Path) -> None:
    """Write ``path``, matrices in bf16 and norms in fp32, as llama.cpp's own converter stores them.

    Raises ConfigError for a checkpoint that is not a plain Llama (biases, q and k norms, scaled RoPE).
    """
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

    spec = ModelSpec.from_folder(checkpoint)
    if spec.architecture not in LLAMA.architectures or spec.rope_scaling is not None:
        raise ConfigError(
            "--model",
            f"must be a {LLAMA.architecture} with plain RoPE to be measured against llama.cpp",
            spec.architecture,
            "Measure another model, or leave llama.cpp out.",
        )
    writer = GGUFWriter(path, "llama")
    writer.add_vocab_size(spec.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_context_length(spec.max_position_embeddings)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.num_layers)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope_theta)
    writer.add_layer_norm_rms_eps(spec.rms_norm_eps)
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    heads = {"self_attn.q_proj": spec.num_heads, "self_attn.k_proj": spec.num_kv_heads}
    for name, tensor in load_tensors(checkpoint, spec).items():
        if tensor.dim() == 1:
            writer.add_tensor(gguf_name(name), tensor.float().numpy())
            continue
        num_heads = next((count for part, count in heads.items() if part in name), 0)
        stored = pairs_from_halves(tensor, num_heads) if num_heads else tensor
        raw = stored.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
        writer.add_tensor(gguf_name(name), raw, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """Return a tensor's name in GGUF. Example: ``model.layers.3.mlp.up_proj.weight`` is ``blk.3.ffn_up.weight``."""
    stem = name.removesuffix(".weight")
    if stem in GGUF_OF_TOP:
        return f"{GGUF_OF_TOP[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_OF_LAYER[part]}.weight"


def pairs_from_halves(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder rows of q and k: llama.cpp rotates neighbours (0,1) where Hugging Face rotates halves (0, dim/2)."""
    half = rows.shape[0] // num_heads // 2
    return rows.view(num_heads, 2, half, -1).transpose(1, 2).reshape(rows.shape)
