"""Steps of functions of a user's own on the embedded engine's core, in this process; and functions for them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rollout.embedded.core import GenerationCore
from slime_spec.agents.function_groups import FunctionGroups
from slime_spec.agents.own import OwnFunction
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.tree import Config, CustomConfig, EngineConfig, ModelConfig, RolloutConfig, SpeculativeConfig
from slime_spec.interfaces import RunState
from slime_spec.request_feed import RequestFeed
from slime_spec.rl.dynamic_filter import Filter
from slime_spec.rl.groups import EngineGroups
from slime_spec.rl.ordered_rollouts import OrderedRollouts
from slime_spec.rl.rollouts import Rollout
from slime_spec.tasks.scoring import PendingSamples
from slime_spec.types import GeneratedSample, GroupRequest, Prompt, Sample
from tests.support.embedded_harness import make_core

START = RunState(rollout_id=0, next_prompt_id=0, weight_version=0)


def agents_config(
    folder: Path, algorithm: str = "NONE", rollout: dict[str, Any] | None = None, **custom: Any
) -> Config:
    """Two prompts of two samples a step, of at most 24 tokens a turn and 160 in all."""
    sizes = {"batch_size": 2, "n_samples_per_prompt": 2, "max_prompt_len": 32, "max_response_len": 24}
    return Config(
        model=ModelConfig(hf_checkpoint=str(folder)),
        rollout=RolloutConfig(**{**sizes, "max_context_len": 160, "num_cpus_per_engine": 1, **(rollout or {})}),
        custom=CustomConfig(**{"generate": "tests:function", **custom}),
        speculative=SpeculativeConfig(algorithm=algorithm, num_draft_tokens=5),
        engine=EngineConfig(max_total_tokens=4096),
    )


class CoreEngines:
    """Implements Engines.generate and abort by one core, which steps whenever it has work."""

    def __init__(self, core: GenerationCore) -> None:
        self.core = core
        self.asked: list[GroupRequest] = []
        self._is_aborted = False

    def generate(self, requests: Sequence[GroupRequest] | RequestFeed) -> Iterator[GeneratedSample]:
        assert isinstance(requests, RequestFeed)
        self._is_aborted = False
        finished: list[GeneratedSample] = []
        groups = []
        while requests.has_more or self.core.has_work:
            for request in requests.taken():
                self.asked.append(request)
                groups.append(self.core.add(request, finished.append))
            if self._is_aborted:
                requests.close()
                for group in groups:
                    self.core.abort(group)
            if self.core.has_work:
                self.core.step()
            yield from finished
            finished.clear()

    def abort(self) -> None:
        self._is_aborted = True


def prompts(tokenizer: Tokenizer) -> Any:
    def take(num: int, start: int) -> list[Prompt]:
        texts = [f"prompt {start + i}:" for i in range(num)]
        return [Prompt(start + i, "task", text, tokenizer.encode(text), str(start + i)) for i, text in enumerate(texts)]

    return take


def by_variety(prompt: Prompt, responses: Sequence[GeneratedSample], owns: Sequence[Any] = ()) -> PendingSamples:
    """A reward that replies of a random policy differ in."""
    texts = [own.response for own in owns] or [""] * len(responses)
    pairs = zip(responses, texts, strict=True)
    samples = [Sample(prompt, each, text, float(len(set(each.token_ids)))) for each, text in pairs]
    return lambda: samples


def step_of(
    config: Config,
    function: OwnFunction | None,
    state: RunState = START,
    dynamic_filter: Filter | None = None,
    engines: Any = None,
    score: Any = by_variety,
) -> tuple[Rollout, Any]:
    """One step of the function on the engines, by default a core of its own."""
    tokenizer = Tokenizer.load(config.model.hf_checkpoint)
    engines = engines or CoreEngines(make_core(config))
    groups = EngineGroups(config) if function is None else FunctionGroups(config, function, tokenizer)
    source = OrderedRollouts(config, engines, prompts(tokenizer), score, groups, dynamic_filter)
    try:
        return source.rollout(state, lambda done, wanted: None), engines
    finally:
        source.close()


async def two_turns(args: Any, sample: Any, sampling_params: Any, client: Any) -> Any:
    """A turn, a tool's result that depends on it, another turn."""
    await client.turn(sample)
    await asyncio.sleep(0.001 * (sample.index or 0))  # a tool takes its time, so that samples overtake each other
    sample.metadata["result"] = f"<{len(set(sample.tokens))}>"
    client.insert(sample, sample.metadata["result"])
    await client.turn(sample, {"max_new_tokens": 12})
    return sample


async def one_turn(args: Any, sample: Any, sampling_params: Any, client: Any) -> Any:
    await client.turn(sample, sampling_params)
    return sample
