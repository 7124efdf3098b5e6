"""A tiny policy, samples for it, and ranks as real processes."""

import importlib
import multiprocessing as mp
import pickle
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from slime_spec.bench.reference_trainer import tiny_samples as tiny_samples
from slime_spec.config.tree import AlgorithmConfig, Config, ModelConfig, PushConfig, TrainerConfig
from tests.support.tiny_models import make_tiny_checkpoint

RANK_TIMEOUT_S = 120.0


def make_policy(folder: Path, architecture: str = "LlamaForCausalLM", tied: bool = True, **overrides: Any) -> Path:
    """A tiny checkpoint whose sizes two tensor ranks and two stages can share."""
    sizes = {
        "vocab_size": 160,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 128,
    }
    return make_tiny_checkpoint(folder, architecture, **{**sizes, "tie_word_embeddings": tied, **overrides})


def tiny_config(folder: Path, trainer: dict[str, Any] | None = None, algorithm: dict[str, Any] | None = None) -> Config:
    options = {"num_cpus_per_rank": 1, "lr": 1e-2, "max_tokens_per_microbatch": 64, **(trainer or {})}
    return Config(
        model=ModelConfig(hf_checkpoint=str(folder)),
        trainer=TrainerConfig(**options),
        algorithm=AlgorithmConfig(**(algorithm or {})),
        push=PushConfig(bucket_bytes=8192),
    )


WORKERS = tuple(f"tests.trainer.{name}_workers" for name in ("rank", "loss", "draft", "mixed"))


def run_ranks(world_size: int, worker: str, *args: Any) -> list[Any]:
    """``<worker>(rank, init_method, *args)`` of one of WORKERS in a process per rank; their results in rank order.

    Workers go by name, and processes come from a fork server, so that Megatron is imported once and never here.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(WORKERS))
    with tempfile.TemporaryDirectory() as folder:
        init_method = f"file://{folder}/rendezvous"
        pipes, processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_answer, args=(theirs, worker, rank, init_method, args))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return [_received(pipe) for pipe in pipes]
        finally:
            for process in processes:
                process.join(5.0)
                process.kill()


def _answer(pipe: Any, worker: str, rank: int, init_method: str, args: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    (function,) = {
        getattr(module, worker) for module in map(importlib.import_module, WORKERS) if hasattr(module, worker)
    }
    # Plain pickle copies tensors into the message; multiprocessing would share memory that ends with this process.
    try:
        pipe.send_bytes(pickle.dumps((function(rank, init_method, *args), None)))
    except Exception:
        pipe.send_bytes(pickle.dumps((None, traceback.format_exc())))
        raise


def _received(pipe: Any) -> Any:
    if not pipe.poll(RANK_TIMEOUT_S):
        raise TimeoutError("a rank did not answer")
    result, problem = pickle.loads(pipe.recv_bytes())
    if problem is not None:
        raise AssertionError(problem)
    return result
