"""This module converts response metadata (SGLang's three generations of keys, RTP-LLM's keys) to counters and back.

The generations are GENERATIONS, newest first; ``sglang/releases.py`` says which release writes which. A response is
read by the newest generation that it has; no keys at all mean that no verify round ran. Every response also has
spec_verify_ct, spec_accept_rate and spec_accept_length.

Without truncation completion_tokens = 1 + spec_verify_ct + spec_num_correct_drafts (the 1 is the prefill's token); a
stop inside an accepted block makes the left side smaller. In a tree the histogram counts accepted paths by their
length, and spec_num_proposed_drafts its nodes: there spec_accept_rate is no acceptance probability.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from slime_spec.speculation.counters import accepted_per_position
from slime_spec.types import GeneratedSample, SpecCounters

ROUNDS = "spec_verify_ct"


@dataclass(frozen=True)
class Generation:
    """Holds the names of one generation of keys; ``histogram`` may be absent in its oldest releases."""

    correct: str
    proposed: str
    histogram: str


CORRECT_DRAFTS = Generation("spec_num_correct_drafts", "spec_num_proposed_drafts", "spec_correct_drafts_histogram")
ACCEPTED_DRAFTS = Generation("spec_accepted_drafts", "spec_proposed_drafts", "spec_accept_histogram")
ACCEPT_TOKENS = Generation("spec_accept_token_num", "spec_draft_token_num", "spec_accept_histogram")
GENERATIONS = (CORRECT_DRAFTS, ACCEPTED_DRAFTS, ACCEPT_TOKENS)


class UnknownMetadataError(ValueError):
    """Verify rounds were reported under keys of no known generation: they must not count as zero."""


def generation_of(meta_info: Mapping[str, Any]) -> Generation | None:
    """Return the newest generation whose counters the response has; None where no verify round ran."""
    if not meta_info.get(ROUNDS):
        return None
    for generation in GENERATIONS:
        if generation.correct in meta_info and generation.proposed in meta_info:
            return generation
    keys = sorted(key for key in meta_info if key.startswith("spec_"))
    raise UnknownMetadataError(f"{meta_info[ROUNDS]} verify rounds under unknown keys: {', '.join(keys)}")


def spec_counters(
    meta_info: Mapping[str, Any], num_steps: int = 0, fills_rounds: bool = True, num_off_steps: int = 0
) -> SpecCounters:
    """Return the counters of one response, with as many plain steps as the caller knows of (``plain_steps``).

    ``num_steps`` is the depth of a draft (SpecCounters.num_steps). ``fills_rounds`` says that the algorithm always
    drafts all it proposes; NGRAM does not, and SGLang does not report how much of a round was padding.
    Example: ``spec_counters({"spec_verify_ct": 2, "spec_accepted_drafts": 3, "spec_proposed_drafts": 6}).num_correct``
    is 3.
    """
    generation = generation_of(meta_info)
    if generation is None:
        return SpecCounters()
    histogram = tuple(int(count) for count in meta_info.get(generation.histogram) or ())
    binned = sum(accepted * count for accepted, count in enumerate(histogram))
    proposed = int(meta_info[generation.proposed])
    return SpecCounters(
        num_rounds=int(meta_info[ROUNDS]),
        num_proposed=proposed,
        histogram=histogram,
        num_drafted=proposed if fills_rounds else 0,
        num_steps=num_steps,
        num_correct_unbinned=int(meta_info[generation.correct]) - binned,
        num_off_steps=num_off_steps,
    )


def plain_steps(meta_info: Mapping[str, Any]) -> int:
    """Return the plain steps between the verify rounds of a response, which RTP-LLM's ``iter_count`` tells of."""
    num_rounds = int(meta_info.get(ROUNDS) or 0)
    return max(0, int(meta_info.get("iter_count") or 0) - num_rounds - 1) if num_rounds else 0


def in_every_generation(meta_info: Mapping[str, Any], num_steps: int = 0) -> dict[str, Any]:
    """Return the response's counters under the keys of every generation and RTP-LLM's; those that it has are as it is.

    Where no verify round ran they are zeros: who reads a missing counter as one round of drafts would be wrong. Raises
    UnknownMetadataError as ``generation_of`` does. ``num_steps`` is the depth of a draft, where it is known.
    """
    spec = spec_counters(meta_info, num_steps)
    if not spec.num_steps:
        spec = replace(spec, num_steps=max(0, len(spec.histogram) - 1))
    num_tokens = int(meta_info.get("completion_tokens", 0))
    keys = speculative_keys(spec, num_tokens) or {ROUNDS: 0, **_counts(0, 0, []), **rtp_counters(spec, num_tokens)}
    return {name: meta_info.get(name, value) for name, value in keys.items()}


def meta_info(sample: GeneratedSample) -> dict[str, Any]:
    """Return the response metadata of one sample; ``output_token_logprobs`` holds (logprob, token id, text or None).

    Beside SGLang's keys: ``weight_version_spans``, [first token index, version] pairs, where several versions
    generated the response; ``draft_version`` where the draft has weights; ``lossy``, true, where verification may
    have bent the target's distribution; ``spec_num_nonfinite_rounds`` where drafts were cut short, see SpecCounters.
    """
    num_tokens = len(sample.token_ids)
    info = {
        "id": f"{sample.group_id}-{sample.sample_index}",
        "finish_reason": finish_reason(sample),
        "prompt_tokens": sample.num_prompt_tokens,
        "completion_tokens": num_tokens,
        "cached_tokens": sample.cached_tokens,
        "weight_version": str(sample.weight_version),
        "e2e_latency": sample.e2e_latency_s,
        "output_token_logprobs": [
            (logprob, token_id, None) for logprob, token_id in zip(sample.logprobs, sample.token_ids, strict=True)
        ],
        **speculative_keys(sample.spec, sample.num_verified_tokens + sample.spec.num_off_steps),
    }
    if sample.loss_mask:
        info["loss_mask"] = list(sample.loss_mask)
    if sample.turns is not None:
        info["num_turns"] = sample.turns.num_turns
    if sample.version_spans:
        info["weight_version_spans"] = [list(span) for span in sample.version_spans]
    if sample.draft_version is not None:
        info["draft_version"] = str(sample.draft_version)
    if sample.lossy:
        info["lossy"] = True
    if sample.spec.num_nonfinite_rounds:
        info["spec_num_nonfinite_rounds"] = sample.spec.num_nonfinite_rounds
    return info


def finish_reason(sample: GeneratedSample) -> dict[str, Any]:
    """Return SGLang's finish reason: the token that matched for a stop, the number of tokens for a length.

    Example: ``{"type": "stop", "matched": 151645}``, ``{"type": "length", "length": 64}``
    """
    reason: dict[str, Any] = {"type": sample.finish_reason}
    if sample.finish_reason == "stop":
        reason["matched"] = sample.matched_stop
    elif sample.finish_reason == "length":
        reason["length"] = len(sample.token_ids)
    return reason


def speculative_keys(spec: SpecCounters, num_tokens: int) -> dict[str, Any]:
    """Return every ``spec_*`` key and RTP-LLM's, or nothing when no verify round ran."""
    if not spec.num_rounds or not spec.num_proposed:
        return {}
    correct, proposed, histogram = spec.num_correct, spec.num_proposed, list(spec.histogram)
    keys: dict[str, Any] = {
        ROUNDS: spec.num_rounds,
        "spec_accept_rate": correct / proposed,
        "spec_accept_length": (num_tokens - spec.num_off_steps) / spec.num_rounds,
    }
    keys |= _counts(correct, proposed, histogram)
    theirs = rtp_counters(spec, num_tokens)
    return {**keys, **theirs, "avg_tokens_per_iter": num_tokens / theirs["iter_count"]}


def _counts(correct: int, proposed: int, histogram: list[int]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for generation in reversed(GENERATIONS):
        keys |= {generation.correct: correct, generation.proposed: proposed, generation.histogram: histogram}
    return keys


def rtp_counters(spec: SpecCounters, num_tokens: int) -> dict[str, Any]:
    """Return RTP-LLM's counters. ``iter_count`` counts steps, the prefill too; without speculation tokens are steps."""
    return {
        "iter_count": spec.num_rounds + spec.num_off_steps + 1 if spec.num_rounds else num_tokens,
        "speculative_draft_rounds": spec.num_rounds,
        "speculative_accepted_tokens_per_pos": accepted_per_position(spec),
    }


def aux_info(sample: GeneratedSample) -> dict[str, Any]:
    """Return RTP-LLM's ``aux_info`` of a sample; times in ms. Without a speculative round its counters are 0 and [].

    ``wait_time`` and ``first_token_cost_time`` are present where they were measured. The prompt tokens that a group's
    first sample computed are ``reuse_len``, all of them in this engine's own memory. Beams, prefill on another
    machine and full softmax rows do not exist here: their fields say so. RTP-LLM's guide divides output_len by
    iter_count for the mean tokens of an iteration.
    """
    num_tokens = len(sample.token_ids)
    measured = {"wait_time": sample.wait_s, "first_token_cost_time": sample.first_token_s}
    return {
        "cost_time": 1000.0 * sample.e2e_latency_s,
        **{name: 1000.0 * seconds for name, seconds in measured.items() if seconds is not None},
        **rtp_counters(sample.spec, num_tokens),
        "prefix_len": 0,
        "input_len": sample.num_prompt_tokens,
        "output_len": num_tokens,
        "step_output_len": num_tokens,
        "reuse_len": sample.cached_tokens,
        "local_reuse_len": sample.cached_tokens,
        "remote_reuse_len": 0,
        "memory_reuse_len": 0,
        "cum_log_probs": [sum(sample.logprobs)],
        "beam_responses": [],
        "softmax_probs": [],
        "pd_sep": False,
        "role_addrs": [],
        "aux_string": "",
    }
