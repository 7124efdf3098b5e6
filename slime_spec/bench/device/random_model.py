"""Models of known shapes have random weights here, made on the device: no file is read, and the host holds nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from rollout.embedded.cuda.graphs import Graphs
from rollout.embedded.drafting import FeatureNeed
from rollout.embedded.kv_cache import KvCache
from rollout.embedded.linear import Packing
from rollout.embedded.model import Decoder
from rollout.embedded.rope import RopeTable
from rollout.embedded.target import Target, Timing
from rollout.embedded.weights import DecoderBuilder
from slime_spec.checkpoints.families.llama import LLAMA
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.rope_settings import RopeScaling
from slime_spec.checkpoints.tensors import EMBEDDING, expected_shapes, save_checkpoint

LLAMA_31_8B = ModelSpec(
    architecture=LLAMA.architecture,
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    tie_word_embeddings=False,
    qkv_bias=False,
    qk_norm=False,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
)
LLAMA_32_1B = replace(
    LLAMA_31_8B,
    num_layers=16,
    hidden_size=2048,
    intermediate_size=8192,
    head_dim=64,
    tie_word_embeddings=True,
    rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
)
SMOLLM2_135M = replace(
    LLAMA_31_8B,
    num_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_position_embeddings=8192,
    rope_theta=100000.0,
    tie_word_embeddings=True,
    rope_scaling=None,
)
TINY = replace(
    SMOLLM2_135M,
    num_layers=2,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=256,
)
SHAPES: Mapping[str, ModelSpec] = {"tiny": TINY, "135m": SMOLLM2_135M, "1b": LLAMA_32_1B, "8b": LLAMA_31_8B}
SCALE = 0.02


def num_weights(spec: ModelSpec) -> int:
    """Return the number of the model's parameters; a tied head counts once."""
    return sum(torch.Size(shape).numel() for shape in expected_shapes(spec).values())


def num_read_weights(spec: ModelSpec) -> int:
    """Return how many parameters one pass reads: all, less an embedding that is not the head too."""
    embedding = 0 if spec.tie_word_embeddings else torch.Size(expected_shapes(spec)[EMBEDDING]).numel()
    return num_weights(spec) - embedding


def random_tensors(
    spec: ModelSpec, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor under its Hugging Face name: normal with deviation SCALE, norms around 1."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in expected_shapes(spec).items():
        tensor = torch.randn(shape, generator=generator, dtype=dtype, device=device).mul_(SCALE)
        yield name, tensor.add_(1.0) if len(shape) == 1 else tensor


def write_random_checkpoint(
    folder: Path, spec: ModelSpec, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> None:
    """Write the random tensors, made on ``device``, as a checkpoint folder without a tokenizer."""
    save_checkpoint(folder, random_tensors(spec, dtype, device, seed), shape_config(spec, dtype))


def shape_config(spec: ModelSpec, dtype: torch.dtype) -> dict[str, Any]:
    """Return the config.json of a shape."""
    config: dict[str, Any] = {
        "architectures": [spec.architecture],
        "model_type": LLAMA.model_type,
        "num_hidden_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.rope_theta,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if spec.rope_scaling is not None:
        config["rope_scaling"] = {"rope_type": "llama3", **vars(spec.rope_scaling)}
    return config


def random_decoder(
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    num_positions: int,
    seed: int = 0,
    packing: Packing | None = None,
) -> Decoder:
    """Build the embedded engine's decoder for sequences of ``num_positions``, packed as the device wants it."""
    builder = DecoderBuilder(spec, RopeTable(spec, num_positions, dtype, device), dtype, device, packing)
    for name, tensor in random_tensors(spec, dtype, device, seed):
        builder.add(name, tensor)
    return builder.finish()


def random_target(
    decoder: Decoder, device: torch.device, num_rows: int, num_positions: int, graphs: Graphs | None = None
) -> Target:
    """Build a target whose cache holds ``num_rows`` sequences of ``num_positions``."""
    dtype = decoder.norm.dtype
    cache = KvCache(decoder.spec, dtype, device, num_rows * num_positions)
    return Target(decoder, cache, FeatureNeed(), dtype, device, perf_counter, Timing(), graphs)
