"""The embedded engine in this process, used as its callers use it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rollout.embedded.engine import EmbeddedEngine
from slime_spec.config.tree import Config, EngineConfig, ModelConfig, SpeculativeConfig
from slime_spec.transports.ray_object_store import RayObjectStoreTransport
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams


def engine_config(model: Path, dtype: str, algorithm: str = "NONE") -> Config:
    return Config(
        model=ModelConfig(hf_checkpoint=str(model)),
        engine=EngineConfig(dtype=dtype),
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
    engine: EmbeddedEngine, prompts: Sequence[tuple[int, ...]], num_new_tokens: int, speculative: bool
) -> list[GeneratedSample]:
    """One reply a prompt, all at once, exactly ``num_new_tokens`` long (EOS does not end it), in the prompts' order."""
    params = SamplingParams(num_new_tokens, temperature=0.0, ignore_eos=True, speculative=speculative)
    generations = [engine.generate(GroupRequest(str(i), prompt, (0,), params)) for i, prompt in enumerate(prompts)]
    return [sample for generation in generations for sample in generation]
