"""Benchmarks run the embedded engine in this process, through its public interface."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rollout.embedded.engine import EmbeddedEngine
from slime_spec.algorithms import NONE
from slime_spec.config.tree import Config, EngineConfig, ModelConfig, SpeculativeConfig
from slime_spec.interfaces import RolloutEngine
from slime_spec.transports.ray_object_store import RayObjectStoreTransport
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams


def engine_config(model: Path, dtype: str, algorithm: str = NONE.name) -> Config:
    return Config(
        model=ModelConfig(hf_checkpoint=str(model)),
        engine=EngineConfig(dtype=dtype, cost_probe_interval=0),  # no other work disturbs the timing
        speculative=SpeculativeConfig(algorithm=algorithm),
    )


@contextmanager
def started_engine(config: Config) -> Iterator[EmbeddedEngine]:
    engine = EmbeddedEngine(config, 0, RayObjectStoreTransport())
    engine.start()
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
