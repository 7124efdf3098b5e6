"""A partial sample is what an aborted generation left of a sample; these rules say how a request resumes it.

    GroupRequest.partials ──► earlier_part ──► the engine generates the rest ──► one whole GeneratedSample
                                                    │
            request_for_rest ◄── aborted again, or its server is lost: another partial sample

A resumed sample has the tokens, logprobs and version spans of all its parts, and the sums of their times. An engine
that resumes by making the generated tokens part of the prompt can do so only where ``can_join_prompt``; elsewhere the
sample keeps its times and starts anew. Every engine, the pool of engines and the training loop use these rules.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import inf

from slime_spec.errors import ConfigError
from slime_spec.types import EarlierReply, GeneratedSample, GroupRequest, SamplingParams, SpecCounters, VersionSpan

# The sum of a softmax rounds: a logprob may be this much above 0.
LOGPROB_ERROR = 1e-3
# A sample that is broken off this often with no new token will never finish.
MAX_FRUITLESS_ATTEMPTS = 3


def as_partial(request: GroupRequest, position: int) -> GeneratedSample:
    """Return the partial sample of a seed; a partial sample without tokens where the request names none."""
    return request.partial_at(position) or GeneratedSample(
        group_id=request.group_id,
        sample_index=position,
        token_ids=(),
        logprobs=(),
        finish_reason="abort",
        weight_version=0,
        num_prompt_tokens=len(request.prompt_token_ids),
    )


def earlier_part(request: GroupRequest, position: int, *, keeps_tokens: bool = True) -> GeneratedSample:
    """Return what a seed's sample has before it is resumed.

    Its times and preemptions always count; the rest describes tokens, and is dropped where there are no tokens or the
    tokens are not kept.
    """
    partial = as_partial(request, position)
    if not request.partials or (partial.token_ids and keeps_tokens):
        return partial
    without_tokens = as_partial(replace(request, partials=()), position)
    return replace(
        without_tokens,
        sample_index=partial.sample_index,
        e2e_latency_s=partial.e2e_latency_s,
        wait_s=partial.wait_s,
        num_preemptions=partial.num_preemptions,
    )


def as_earlier(finished: GeneratedSample) -> EarlierReply:
    """Return what a finished sample said, for the other samples of its group."""
    return EarlierReply(finished.token_ids, finished.weight_version, finished.sample_index)


def with_siblings(request: GroupRequest, finished: Iterable[GeneratedSample]) -> GroupRequest:
    """Return the request with samples of its group that have finished, to be drafted from; each sample once."""
    known = {each.sample_index for each in request.earlier}
    siblings = tuple(as_earlier(each) for each in finished if each.sample_index not in known)
    return replace(request, earlier=request.earlier + siblings) if siblings else request


def request_for_rest(request: GroupRequest, partials: Iterable[GeneratedSample]) -> GroupRequest:
    """Return the request that resumes these samples of ``request``, with their own seeds, ordered by sample_index."""
    ordered = sorted(partials, key=lambda sample: sample.sample_index)
    seeds = dict(zip(request.sample_indices, request.seeds, strict=True))
    return replace(request, seeds=tuple(seeds[each.sample_index] for each in ordered), partials=tuple(ordered))


def can_join_prompt(params: SamplingParams) -> bool:
    """Return whether generated tokens may become part of the prompt without changing the distribution of the rest.

    Stop strings may begin before the joint, and SGLang's penalties (``repetition_penalty`` too) count no token of a
    prompt. All other parameters say nothing of earlier tokens, but for the budgets, of which the rest is asked for.
    """
    penalties = (params.frequency_penalty, params.presence_penalty, params.repetition_penalty)
    return not params.stop and penalties == (0.0, 0.0, 1.0)


def rounds_are_known(num_tokens: int, spec: SpecCounters) -> bool:
    """Return whether the counters of a speculated part cover its tokens: all tokens but the first come out of rounds.

    Tokens without their rounds would look like speed, so a response with such a part has no counters at all.
    """
    return spec.num_rounds + spec.num_off_steps > 0 or num_tokens <= 1


def note_version(spans: list[VersionSpan], first_token: int, version: int) -> None:
    """Add a span where the version changes."""
    if not spans or spans[-1][1] != version:
        spans.append((first_token, version))


def reported_spans(spans: Iterable[VersionSpan], oldest_version: int) -> tuple[VersionSpan, ...]:
    """Return spans as GeneratedSample.version_spans has them: none where ``oldest_version`` generated every token."""
    spans = tuple(spans)
    return () if [version for _, version in spans] in ([], [oldest_version]) else spans


@dataclass
class FruitlessAttempts:
    """Counts the attempts in a row that ended one sample's part without a new token. Example::

    if attempts.note(num_new_tokens > 0): raise RuntimeError(...)
    """

    num: int = 0

    def note(self, brought_tokens: bool) -> bool:
        """Count an attempt that was broken off; return True if no further attempt should be made."""
        self.num = 0 if brought_tokens else self.num + 1
        return self.num == MAX_FRUITLESS_ATTEMPTS


def check_partials(request: GroupRequest, vocab_size: int) -> None:
    """Raise ConfigError for partial samples that no engine can resume."""
    partials = request.partials
    if not partials:
        return
    if len(partials) != len(request.seeds):
        raise ConfigError(
            "request.partials",
            f"must hold one sample for each of the {len(request.seeds)} seeds, or none",
            len(partials),
            "Give a sample without tokens where nothing was generated.",
        )
    if len(set(request.sample_indices)) < len(partials):
        raise ConfigError(
            "request.partials", "must hold each sample once", request.sample_indices, "Leave out the second of them."
        )
    for sample in partials:
        _check_partial(sample, request.params.max_new_tokens, vocab_size)


def _check_partial(sample: GeneratedSample, max_new_tokens: int, vocab_size: int) -> None:
    ids, index = sample.token_ids, sample.sample_index
    for holds, rule, value in (
        (sample.finish_reason == "abort", "must hold samples that were aborted", sample.finish_reason),
        (len(sample.logprobs) == len(ids), f"must hold a logprob for each of {len(ids)} tokens", len(sample.logprobs)),
        (
            all(-inf < logprob <= LOGPROB_ERROR for logprob in sample.logprobs),
            "must hold logprobs of tokens, finite and at most 0",
            next((each for each in sample.logprobs if not -inf < each <= LOGPROB_ERROR), None),
        ),
        (len(ids) < max_new_tokens, f"must leave room within max_new_tokens ({max_new_tokens})", len(ids)),
        (
            not ids or 0 <= min(ids) <= max(ids) < vocab_size,
            f"must hold token ids from 0 to {vocab_size - 1}",
            (min(ids, default=0), max(ids, default=0)),
        ),
    ):
        if not holds:
            raise ConfigError(
                "request.partials", f"{rule}; sample {index} does not", value, "Give samples as an engine left them."
            )
