"""Run in a new process: start an engine, fill its KV cache, and print the memory in use as one JSON line.

python -m slime_spec.bench.memory_probe MODEL DTYPE MAX_TOTAL_TOKENS
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from slime_spec.bench.local_engine import engine_config, greedy, started_engine
from slime_spec.bench.memory import pss_bytes
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import expected_shapes
from slime_spec.memory import release_freed_memory

NUM_SEQUENCES, NUM_NEW_TOKENS = 8, 8


@dataclass(frozen=True)
class Held:
    """Holds the bytes of the process, of the process before the engine, of the weights once, and of the KV bound."""

    process: int
    before: int
    weights: int
    kv_bound: int


def held_memory(model: Path, dtype: str, max_total_tokens: int) -> Held:
    """Start an engine, generate until most of the KV bound is in use, and measure this process."""
    release_freed_memory()
    before = pss_bytes(os.getpid())
    spec = ModelSpec.from_folder(model)
    itemsize = getattr(torch, dtype).itemsize
    config = engine_config(model, dtype)
    config = replace(config, engine=replace(config.engine, max_total_tokens=max_total_tokens))
    per_sequence = max_total_tokens // NUM_SEQUENCES
    with started_engine(config) as engine:
        prompt = tuple(token % spec.vocab_size for token in range(per_sequence - 2 * NUM_NEW_TOKENS))
        greedy(engine, [prompt] * NUM_SEQUENCES, NUM_NEW_TOKENS, speculative=False)
        release_freed_memory()
        process = pss_bytes(os.getpid())
    weights = sum(torch.Size(shape).numel() for shape in expected_shapes(spec).values()) * itemsize
    kv_bound = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * itemsize * max_total_tokens
    return Held(process, before, weights, kv_bound)


if __name__ == "__main__":
    torch.set_num_threads(1)
    held = held_memory(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    sys.stdout.write(json.dumps(asdict(held)) + "\n")
