"""A finished sample as SGLang's ``meta_info``, in all three generations of its speculative keys, and as RTP-LLM's.

    up to 0.5.10    spec_accept_token_num, spec_draft_token_num
    0.5.11          spec_accepted_drafts, spec_proposed_drafts, spec_accept_histogram
    from 0.5.12     spec_num_correct_drafts, spec_num_proposed_drafts, spec_correct_drafts_histogram
    all             spec_verify_ct, spec_accept_rate, spec_accept_length
    RTP-LLM         iter_count, avg_tokens_per_iter, speculative_draft_rounds, speculative_accepted_tokens_per_pos

As there, the speculative keys are absent when no verify round ran. Without truncation
completion_tokens = 1 + spec_verify_ct + spec_num_correct_drafts (the 1 is the prefill's token); a stop inside an
accepted block makes the left side smaller.
"""

from __future__ import annotations

from typing import Any

from slime_spec.types import GeneratedSample, SpecCounters


def meta_info(sample: GeneratedSample) -> dict[str, Any]:
    """The response metadata of one sample; ``output_token_logprobs`` holds (logprob, token id, text or None)."""
    num_tokens = len(sample.token_ids)
    return {
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
        **speculative_keys(sample.spec, num_tokens),
    }


def finish_reason(sample: GeneratedSample) -> dict[str, Any]:
    """SGLang's: what matched for a stop, how many tokens for a length.

    Example: ``{"type": "stop", "matched": 151645}``, ``{"type": "length", "length": 64}``
    """
    reason: dict[str, Any] = {"type": sample.finish_reason}
    if sample.finish_reason == "stop":
        reason["matched"] = sample.matched_stop
    elif sample.finish_reason == "length":
        reason["length"] = len(sample.token_ids)
    return reason


def speculative_keys(spec: SpecCounters, num_tokens: int) -> dict[str, Any]:
    """Every ``spec_*`` key and RTP-LLM's, or nothing when no verify round ran."""
    if not spec.num_rounds or not spec.num_proposed:
        return {}
    correct, proposed, histogram = spec.num_correct, spec.num_proposed, list(spec.histogram)
    iter_count = spec.num_rounds + 1  # RTP-LLM counts the prefill
    return {
        "spec_verify_ct": spec.num_rounds,
        "spec_accept_rate": correct / proposed,
        "spec_accept_length": num_tokens / spec.num_rounds,
        "spec_accept_token_num": correct,
        "spec_draft_token_num": proposed,
        "spec_accepted_drafts": correct,
        "spec_proposed_drafts": proposed,
        "spec_accept_histogram": histogram,
        "spec_num_correct_drafts": correct,
        "spec_num_proposed_drafts": proposed,
        "spec_correct_drafts_histogram": histogram,
        "iter_count": iter_count,
        "avg_tokens_per_iter": num_tokens / iter_count,
        "speculative_draft_rounds": spec.num_rounds,
        "speculative_accepted_tokens_per_pos": accepted_per_position(spec),
    }


def accepted_per_position(spec: SpecCounters) -> list[int]:
    """Rounds whose draft at each position was accepted (survival counts), as long as a round's draft.

    Example: ``accepted_per_position(SpecCounters(3, 9, (1, 0, 1, 1))) == [2, 2, 1]``
    """
    drafts_per_round = spec.num_proposed // spec.num_rounds if spec.num_rounds else 0
    return [sum(spec.histogram[position + 1 :]) for position in range(drafts_per_round)]
