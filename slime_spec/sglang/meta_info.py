"""A finished sample as SGLang's ``meta_info``, in all three generations of its speculative keys, and as RTP-LLM's.

    up to 0.5.10    spec_accept_token_num, spec_draft_token_num
    0.5.11          spec_accepted_drafts, spec_proposed_drafts, spec_accept_histogram
    from 0.5.12     spec_num_correct_drafts, spec_num_proposed_drafts, spec_correct_drafts_histogram
    all             spec_verify_ct, spec_accept_rate, spec_accept_length
    RTP-LLM         iter_count, avg_tokens_per_iter, speculative_draft_rounds, speculative_accepted_tokens_per_pos

As there, the speculative keys are absent when no verify round ran. Without truncation
completion_tokens = 1 + spec_verify_ct + spec_num_correct_drafts (the 1 is the prefill's token); a stop inside an
accepted block makes the left side smaller. In a tree the histogram counts accepted paths by their length, and
spec_num_proposed_drafts its nodes: there spec_accept_rate is no acceptance probability.
"""

from __future__ import annotations

from typing import Any

from slime_spec.types import GeneratedSample, SpecCounters


def meta_info(sample: GeneratedSample) -> dict[str, Any]:
    """The response metadata of one sample; ``output_token_logprobs`` holds (logprob, token id, text or None).

    Beside SGLang's keys: ``weight_version_spans``, [first token index, version] pairs, where several versions
    generated the response; ``draft_version`` where the draft has weights; ``lossy``, true, where verification may
    have bent the target's distribution.
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
        **speculative_keys(sample.spec, num_tokens),
    }
    if sample.version_spans:
        info["weight_version_spans"] = [list(span) for span in sample.version_spans]
    if sample.draft_version is not None:
        info["draft_version"] = str(sample.draft_version)
    if sample.lossy:
        info["lossy"] = True
    return info


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
    iterations = iter_count(spec, num_tokens)
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
        "iter_count": iterations,
        "avg_tokens_per_iter": num_tokens / iterations,
        "speculative_draft_rounds": spec.num_rounds,
        "speculative_accepted_tokens_per_pos": accepted_per_position(spec),
    }


def aux_info(sample: GeneratedSample) -> dict[str, Any]:
    """RTP-LLM's ``aux_info`` of one sample; times in ms. Without a speculative round its counters are 0 and [].

    ``wait_time`` and ``first_token_cost_time`` are there where they were measured. The prompt tokens that a group's
    first sample computed are ``reuse_len``, all of them in this engine's own memory. Beams, prefill on another
    machine and full softmax rows do not exist here: their fields say so. RTP-LLM's guide divides output_len by
    iter_count for the mean tokens of an iteration.
    """
    spec, num_tokens = sample.spec, len(sample.token_ids)
    measured = {"wait_time": sample.wait_s, "first_token_cost_time": sample.first_token_s}
    return {
        "cost_time": 1000.0 * sample.e2e_latency_s,
        **{name: 1000.0 * seconds for name, seconds in measured.items() if seconds is not None},
        "iter_count": iter_count(spec, num_tokens),
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
        "speculative_draft_rounds": spec.num_rounds,
        "speculative_accepted_tokens_per_pos": accepted_per_position(spec),
        "role_addrs": [],
        "aux_string": "",
    }


def iter_count(spec: SpecCounters, num_tokens: int) -> int:
    """RTP-LLM's: steps of the request, the prefill included; without speculation every token is a step."""
    return spec.num_rounds + 1 if spec.num_rounds else num_tokens


def accepted_per_position(spec: SpecCounters) -> list[int]:
    """Rounds that accepted more than so many drafts (survival counts), as long as a round can accept.

    Example: ``accepted_per_position(SpecCounters(3, 9, (1, 0, 1, 1))) == [2, 2, 1]``
    """
    if not spec.num_rounds:
        return []
    depth = spec.num_steps or spec.num_proposed // spec.num_rounds
    return [sum(spec.histogram[position + 1 :]) for position in range(depth)]
