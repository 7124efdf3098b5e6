"""Benchmarks run the embedded engine in this process, through its public interface."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from rollout.embedded.engine import EmbeddedEngine
from slime_spec.algorithms import NONE
from slime_spec.config.tree import Config, EngineConfig, ModelConfig, RolloutConfig, SpeculativeConfig
from slime_spec.errors import ConfigError
from slime_spec.interfaces import RolloutEngine
from slime_spec.sglang.draft_shape import draft_shape
from slime_spec.transports.ray_object_store import RayObjectStoreTransport
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams

# A GPU's cache holds 64 sequences of every model and length that is measured.
GPU_KV_CACHE_GB = 8.0


def engine_config(model: Path, dtype: str, algorithm: str = NONE.name, num_gpus: int = 0) -> Config:
    """Configure an engine on the CPU, or on the GPU where ``num_gpus`` is 1.

    An algorithm drafts its fixed default shape in every round: a benchmark measures drafts, and a controller that
    stops drafting, or drafts less while it learns, would be measured instead of them. Nor are prompts kept: sides get
    the same ones again and again.
    """
    kv_cache_gb = GPU_KV_CACHE_GB if num_gpus else EngineConfig.kv_cache_gb
    return Config(
        model=ModelConfig(hf_checkpoint=str(model)),
        rollout=RolloutConfig(num_gpus_per_engine=num_gpus),
        # No other work disturbs the timing.
        engine=EngineConfig(dtype=dtype, cost_probe_interval=0, kv_cache_gb=kv_cache_gb, disable_radix_cache=True),
        speculative=_fixed(SpeculativeConfig(algorithm=algorithm)),
    )


def _fixed(config: SpeculativeConfig) -> SpeculativeConfig:
    """Return the settings with the default number of drafts written down, where they would leave it to the engine."""
    if not config.is_automatic or config.record.has_numbers:  # a network's three numbers are the benchmark's to choose
        return config
    return replace(config, num_draft_tokens=draft_shape(config, architecture="").num_draft_tokens)


def device_of(num_gpus: int | None) -> torch.device:
    return torch.device("cuda" if num_gpus else "cpu")


def check_num_gpus(num_gpus: int | None) -> None:
    """Refuse, as a ConfigError, a number that the embedded engine cannot run on, and a GPU that is not there."""
    if num_gpus not in (0, 1):
        rule = "must be 0 (the CPU) or 1: the embedded engine runs on one GPU"
        raise ConfigError("--num-gpus", rule, num_gpus, "Pass --num-gpus 1.")
    if num_gpus and not torch.cuda.is_available():
        rule = "needs a GPU that this machine's torch can use"
        raise ConfigError("--num-gpus", rule, num_gpus, "Pass --num-gpus 0, or install a torch with CUDA beside a GPU.")


@contextmanager
def started_engine(config: Config, first: EmbeddedEngine | None = None) -> Iterator[EmbeddedEngine]:
    """Run an engine in this process, with the target's weights of ``first``, which it is measured against."""
    engine = EmbeddedEngine(config, 0, RayObjectStoreTransport())
    engine.start()
    if first is not None:
        engine.share_target(first)
    try:
        yield engine
    finally:
        engine.stop()


def greedy(
    engine: RolloutEngine,
    prompts: Sequence[tuple[int, ...]],
    num_new_tokens: int,
    speculative: bool,
    stop_token_ids: tuple[int, ...] = (),
) -> list[GeneratedSample]:
    """Generate one reply per prompt, all at once, in the prompts' order.

    A reply is exactly ``num_new_tokens`` long, or ends at one of ``stop_token_ids`` (EOS by itself does not end it).
    """
    params = SamplingParams(
        num_new_tokens,
        temperature=0.0,
        stop_token_ids=stop_token_ids,
        ignore_eos=not stop_token_ids,
        speculative=speculative,
    )
    generations = [engine.generate(GroupRequest(str(i), prompt, (0,), params)) for i, prompt in enumerate(prompts)]
    return [sample for generation in generations for sample in generation]
