"""The check of requests refuses, before queueing, a request that the engine's limits can never allow."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite

from slime_spec.algorithms import NONE
from slime_spec.errors import ConfigError
from slime_spec.partial_samples import check_partials
from slime_spec.speculation.request_fields import check_speculative_params
from slime_spec.types import GroupRequest, SamplingParams

UNBOUNDED = 2**63
MAX_LOGIT_BIAS = 1e30  # divided by the least temperature it is still an fp32 number; -inf bans a token


@dataclass(frozen=True)
class RequestLimits:
    """Holds the limits of one request to an engine.

    ``max_total_tokens`` is the engine's KV cache, UNBOUNDED where a server manages its own; ``headroom`` are the KV
    positions that a row needs beyond its tokens. ``speculates_by_request``: a request may decode without speculation
    although its engine speculates. ``dies_of_unknown_tokens``: stop tokens beyond the vocabulary end the server, where
    elsewhere they only never occur.
    """

    vocab_size: int
    context_length: int
    algorithm: str
    max_total_tokens: int = UNBOUNDED
    headroom: int = 0
    speculates_by_request: bool = True
    dies_of_unknown_tokens: bool = False

    @property
    def drafted(self) -> str:
        """Return the headroom as the last term of the sum that an error shows."""
        return f" + {self.headroom} drafted" if self.headroom else ""


def check_request(request: GroupRequest, limits: RequestLimits) -> None:
    """Raise ConfigError for a request that can never run."""
    prompt, params = request.prompt_token_ids, request.params
    if not prompt:
        raise ConfigError("prompt", "must hold at least one token", request.group_id, "Leave out empty prompts.")
    check_token_ids("prompt", prompt, limits)
    if limits.dies_of_unknown_tokens:
        check_token_ids("rollout.stop_token_ids", params.stop_token_ids, limits)
    if not request.seeds:
        raise ConfigError("rollout.n_samples_per_prompt", "must be at least 1", 0, "Pass --n-samples-per-prompt 1.")
    check_partials(request, limits.vocab_size)
    check_params(params, limits.vocab_size)
    check_speculative_params(params, limits.algorithm, limits.vocab_size)
    if not (params.speculative or limits.speculates_by_request):
        raise ConfigError(
            "sampling_params.speculative",
            "the engine speculates for all of a server's requests or for none",
            False,
            f"Pass --speculative-algorithm {NONE.name}, or --rollout-engine embedded.",
        )
    _check_lengths(request, limits)


def check_token_ids(setting: str, token_ids: tuple[int, ...], limits: RequestLimits) -> None:
    """Raise ConfigError for ids that the model has no embedding for."""
    unknown = [token for token in token_ids if not 0 <= token < limits.vocab_size]
    if unknown:
        rule = f"must hold token ids from 0 to {limits.vocab_size - 1}"
        raise ConfigError(setting, rule, unknown[0], "Use the tokenizer of this checkpoint.")


def _check_lengths(request: GroupRequest, limits: RequestLimits) -> None:
    num_prompt, num_new = len(request.prompt_token_ids), request.params.max_new_tokens
    total = num_prompt + num_new
    if total > limits.context_length:
        raise ConfigError(
            "engine.context_length",
            f"must hold prompt ({num_prompt}) plus max_new_tokens ({num_new}) = {total} tokens",
            limits.context_length,
            "Shorten the prompt or lower --rollout-max-response-len.",
        )
    if total + limits.headroom > limits.max_total_tokens:
        raise ConfigError(
            "engine.max_total_tokens",
            f"must hold at least one sequence of this request ({total} tokens{limits.drafted})",
            limits.max_total_tokens,
            "Raise --sglang-max-total-tokens or engine.kv_cache_gb.",
        )


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """Raise ConfigError for sampling parameters out of their bounds."""
    rules = (
        ("max_new_tokens", params.max_new_tokens >= 1, "must be at least 1", "Pass --rollout-max-response-len 1."),
        ("temperature", 0.0 <= params.temperature < inf, "must be a number, 0 or above", "Pass 0 for greedy decoding."),
        ("top_p", 0.0 < params.top_p <= 1.0, "must be above 0 and at most 1", "Pass 1 to keep every token."),
        ("top_k", params.top_k == -1 or params.top_k >= 1, "must be -1 or at least 1", "Pass -1 to keep every token."),
        ("min_p", 0.0 <= params.min_p <= 1.0, "must be from 0 to 1", "Pass 0 to keep every token."),
        ("stop", all(params.stop), "must not hold an empty string", "Leave out the empty stop string."),
        ("stop_token_ids", min(params.stop_token_ids, default=0) >= 0, "must not be negative", "Leave them out."),
        ("frequency_penalty", isfinite(params.frequency_penalty), "must be a number", "Pass 0 for no penalty."),
        ("presence_penalty", isfinite(params.presence_penalty), "must be a number", "Pass 0 for no penalty."),
        ("repetition_penalty", 0.0 < params.repetition_penalty < inf, "must be above 0", "Pass 1 for no penalty."),
        (
            "min_new_tokens",
            0 <= params.min_new_tokens <= params.max_new_tokens,
            f"must be from 0 to max_new_tokens ({params.max_new_tokens})",
            "Lower it.",
        ),
        (
            "logit_bias",
            all(0 <= token < vocab_size and bias <= MAX_LOGIT_BIAS for token, bias in params.logit_bias),
            f"must name tokens from 0 to {vocab_size - 1}, with biases that are numbers of at most {MAX_LOGIT_BIAS:g}",
            "Use the tokenizer of this checkpoint, and smaller biases.",
        ),
    )
    for name, holds, rule, remedy in rules:
        if not holds:
            raise ConfigError(f"rollout.{name}", rule, getattr(params, name), remedy)
