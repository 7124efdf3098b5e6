"""Samples that go on from an earlier part (GroupRequest.begun): which can, and what is known of both parts together."""

from __future__ import annotations

from slime_spec.errors import ConfigError
from slime_spec.types import GeneratedSample, GroupRequest

# A sample that is broken off this often with no token in between will be for ever.
MAX_FRUITLESS_PARTS = 3


def as_begun(request: GroupRequest, position: int) -> GeneratedSample:
    """What a seed's sample goes on from, in the form of a sample also where nothing has begun."""
    return request.begun_at(position) or GeneratedSample(
        group_id=request.group_id,
        sample_index=position,
        token_ids=(),
        logprobs=(),
        finish_reason="abort",
        weight_version=0,
        num_prompt_tokens=len(request.prompt_token_ids),
    )


def check_begun(request: GroupRequest, vocab_size: int) -> None:
    """Raise ConfigError for parts that nothing can go on from."""
    begun = request.begun
    if not begun:
        return
    if len(begun) != len(request.seeds):
        raise ConfigError(
            "request.begun",
            f"must hold one sample for each of the {len(request.seeds)} seeds, or none",
            len(begun),
            "Give a sample without tokens where one has not begun.",
        )
    if len(set(request.sample_indices)) < len(begun):
        raise ConfigError(
            "request.begun", "must hold each sample once", request.sample_indices, "Leave out the second of them."
        )
    for sample in begun:
        _check_part(sample, request.params.max_new_tokens, vocab_size)


def _check_part(sample: GeneratedSample, max_new_tokens: int, vocab_size: int) -> None:
    ids, index = sample.token_ids, sample.sample_index
    for holds, rule, value in (
        (sample.finish_reason == "abort", "must hold samples that were aborted", sample.finish_reason),
        (len(sample.logprobs) == len(ids), f"must hold a logprob for each of {len(ids)} tokens", len(sample.logprobs)),
        (len(ids) < max_new_tokens, f"must leave room within max_new_tokens ({max_new_tokens})", len(ids)),
        (
            not ids or 0 <= min(ids) <= max(ids) < vocab_size,
            f"must hold token ids from 0 to {vocab_size - 1}",
            (min(ids, default=0), max(ids, default=0)),
        ),
    ):
        if not holds:
            raise ConfigError(
                "request.begun", f"{rule}; sample {index} does not", value, "Give samples as an engine left them."
            )


def rounds_are_known(num_tokens: int, num_rounds: int) -> bool:
    """Whether a part of a speculated response tells its rounds: all tokens but its first come out of rounds.

    Tokens without their rounds would look like speed, so a response with such a part has no counters at all.
    """
    return num_rounds > 0 or num_tokens <= 1
