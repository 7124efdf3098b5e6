"""The embedded engine's core without its thread, on tiny checkpoints: what most of its tests need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from rollout.embedded.assemble import Assembly
from rollout.embedded.core import GenerationCore
from rollout.embedded.draft import Draft
from rollout.embedded.drafting import DraftContext, KvRow, Outcome, WeightlessDrafter
from rollout.embedded.kv_cache import KvStore
from rollout.embedded.plan import RowSpan
from slime_spec.config.tree import Config, EngineConfig, ModelConfig, SpeculativeConfig
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams

VOCAB = 131  # of the tiny checkpoints
Samples = dict[tuple[str, int], GeneratedSample]


def engine_config(folder: Path, algorithm: str = "NONE", num_draft_tokens: int = 5, **engine: Any) -> Config:
    return Config(
        model=ModelConfig(hf_checkpoint=str(folder)),
        speculative=SpeculativeConfig(algorithm=algorithm, num_draft_tokens=num_draft_tokens),
        engine=EngineConfig(**engine),
    )


def make_core(config: Config, **replaced: Any) -> GenerationCore:
    return Assembly(config).core(0, perf_counter, **replaced)


def run(core: GenerationCore, requests: Sequence[GroupRequest]) -> Samples:
    """Every sample of the requests, generated in one batch."""
    samples: Samples = {}
    for request in requests:
        core.add(request, lambda sample: samples.__setitem__((sample.group_id, sample.sample_index), sample))
    while core.has_work:
        core.step()
    return samples


def prefill(core: GenerationCore, store: KvStore, row: int, prompt: Sequence[int]) -> torch.Tensor:
    """Put a prompt into one row of a store by hand; the logits [1, vocab] after it."""
    output = core.target.run(store, [RowSpan(row, 0, len(prompt))], prompt)
    return core.target.logits(output.hidden[-1:]).cpu()


def greedy(max_new_tokens: int, **params: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0, **params)


def random_prompt(length: int, seed: int, vocab: int = 131) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, vocab, (length,), generator=generator).tolist())


def draft_context(
    key: int, token_ids: Sequence[int], num_prompt_tokens: int, limit: int, params: SamplingParams | None = None
) -> DraftContext:
    """What a drafter without a network is asked with."""
    params = params or SamplingParams()
    return DraftContext(key, 0, KvRow(0), token_ids, num_prompt_tokens, limit, limit, params, uniforms=())


class ScriptedDrafter(WeightlessDrafter):
    """Proposes what ``script(context)`` says: an oracle, an adversary, anything a test needs."""

    def __init__(self, script: Callable[[DraftContext], Sequence[int]]) -> None:
        self._script = script
        self.observed: list[tuple[int, int]] = []
        self.forgotten: list[int] = []

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        return [
            Draft.chain(tuple(self._script(each))[: min(each.max_draft_tokens, each.max_depth)]) for each in contexts
        ]

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        self.observed += [(outcome.request_key, len(outcome.path)) for outcome in outcomes]

    def forget(self, request_key: int) -> None:
        self.forgotten.append(request_key)


def continuation(samples: Samples, prompts: Sequence[Sequence[int]]) -> Callable[[DraftContext], Sequence[int]]:
    """What an earlier run with the same seeds generated from here on; group i's prompt is ``prompts[i]``."""
    outputs: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for (group_id, _), sample in samples.items():
        outputs.setdefault(tuple(prompts[int(group_id)]), []).append(sample.token_ids)

    def rest(context: DraftContext) -> Sequence[int]:
        prompt = tuple(context.token_ids[: context.num_prompt_tokens])
        generated = tuple(context.token_ids[context.num_prompt_tokens :])
        candidates = [each for each in outputs[prompt] if each[: len(generated)] == generated]
        return candidates[0][len(generated) :] if candidates else ()

    return rest


class ReplayDrafter(ScriptedDrafter):
    """Drafts what an earlier run with the same seeds generated, with every ``wrong_every``-th token changed."""

    def __init__(self, samples: Samples, prompts: Sequence[Sequence[int]], wrong_every: int = 0) -> None:
        rest = continuation(samples, prompts)

        def script(context: DraftContext) -> Sequence[int]:
            first = len(context.token_ids) - context.num_prompt_tokens
            return [
                (token + 1) % VOCAB if wrong_every and (first + i) % wrong_every == 0 else token
                for i, token in enumerate(rest(context))
            ]

        super().__init__(script)
