"""The embedded engine's core without its thread, on tiny checkpoints: what most of its tests need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from rollout.embedded.assemble import Assembly
from rollout.embedded.core import GenerationCore
from slime_spec.config.tree import Config, EngineConfig, ModelConfig, SpeculativeConfig
from slime_spec.interfaces import Draft, DraftContext
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


def greedy(max_new_tokens: int, **params: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0, **params)


def random_prompt(length: int, seed: int, vocab: int = 131) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, vocab, (length,), generator=generator).tolist())


class ScriptedDrafter:
    """Proposes what ``script(context)`` says: an oracle, an adversary, anything a test needs."""

    def __init__(self, script: Callable[[DraftContext], Sequence[int]]) -> None:
        self._script = script
        self.observed: list[tuple[int, int]] = []
        self.forgotten: list[int] = []

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        chains = [tuple(self._script(context))[: context.max_draft_tokens] for context in contexts]
        return [Draft(chain, tuple(range(-1, len(chain) - 1))) for chain in chains]

    def observe(self, request_key: int, num_accepted: int) -> None:
        self.observed.append((request_key, num_accepted))

    def forget(self, request_key: int) -> None:
        self.forgotten.append(request_key)

    def load(self, tensors: Any) -> None:
        raise AssertionError("a scripted drafter has no weights")


class ReplayDrafter(ScriptedDrafter):
    """Drafts what an earlier run with the same seeds generated, with every ``wrong_every``-th token changed."""

    def __init__(self, samples: Samples, prompts: Sequence[Sequence[int]], wrong_every: int = 0) -> None:
        outputs: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for (group_id, _), sample in samples.items():
            outputs.setdefault(tuple(prompts[int(group_id)]), []).append(sample.token_ids)

        def script(context: DraftContext) -> Sequence[int]:
            prompt = tuple(context.token_ids[: context.num_prompt_tokens])
            generated = tuple(context.token_ids[context.num_prompt_tokens :])
            candidates = [each for each in outputs[prompt] if each[: len(generated)] == generated]
            rest = candidates[0][len(generated) :] if candidates else ()
            return [
                (token + 1) % VOCAB if wrong_every and (len(generated) + i) % wrong_every == 0 else token
                for i, token in enumerate(rest)
            ]

        super().__init__(script)
