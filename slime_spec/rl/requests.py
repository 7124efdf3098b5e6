"""Prompts become group requests, with seeds that depend only on the run, the prompt and the sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import xxhash

from slime_spec.config.tree import RolloutConfig
from slime_spec.types import GroupRequest, Prompt, SamplingParams


def sample_seed(run_seed: int, prompt_id: int, sample_index: int) -> int:
    """Return a 63-bit seed; a restart, or another number of engines, draws the same samples."""
    return xxhash.xxh3_64_intdigest(f"{run_seed}/{prompt_id}/{sample_index}".encode()) >> 1


def turn_seed(run_seed: int, prompt_id: int, sample_index: int, turn: int) -> int:
    """Return the seed of a sample's turn; the first turn's is the sample's."""
    if turn == 0:
        return sample_seed(run_seed, prompt_id, sample_index)
    return xxhash.xxh3_64_intdigest(f"{run_seed}/{prompt_id}/{sample_index}/{turn}".encode()) >> 1


def sampling_params(config: RolloutConfig) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=config.max_response_len,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        stop=config.stop,
        stop_token_ids=config.stop_token_ids,
    )


def group_requests(
    prompts: Sequence[Prompt], config: RolloutConfig, run_seed: int, edit: bool = False
) -> list[GroupRequest]:
    """Return one group per prompt, ``n_samples_per_prompt`` seeds each; the group id is the prompt id.

    A prompt's advice goes with its group; ``edit`` says how LOOKUP reads it.
    """
    params = replace(sampling_params(config), edit=edit)
    return [
        GroupRequest(
            group_id=str(prompt.prompt_id),
            prompt_token_ids=prompt.token_ids,
            seeds=tuple(sample_seed(run_seed, prompt.prompt_id, i) for i in range(config.n_samples_per_prompt)),
            params=replace(params, advice_token_ids=prompt.advice_token_ids),
        )
        for prompt in prompts
    ]
