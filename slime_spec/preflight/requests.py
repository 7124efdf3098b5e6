"""The check of requests refuses, before queueing, a request that the engine's limits can never allow."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from slime_spec.algorithms import NONE
from slime_spec.errors import ConfigError
from slime_spec.partial_samples import check_partials
from slime_spec.sampling_bounds import BOUNDS, MAX_LOGIT_BIAS, MAX_STOP_CHARS, MAX_STOP_STRINGS
from slime_spec.speculation.request_fields import check_speculative_params
from slime_spec.types import GroupRequest, SamplingParams

UNBOUNDED = 2**63


@dataclass(frozen=True)
class RequestLimits:
    """Holds the limits of one request to an engine.

    ``max_total_tokens`` is the engine's KV cache, UNBOUNDED where a server manages its own; ``headroom`` are the KV
    positions that a row needs beyond its tokens. ``speculates_by_request``: a request may decode without speculation
    although its engine speculates. ``dies_of_unknown_tokens``: stop tokens beyond the vocabulary end the server, where
    elsewhere they only never occur. ``eos_token_ids`` are banned until ``min_new_tokens``, as stop tokens are.
    """

    vocab_size: int
    context_length: int
    algorithm: str
    max_total_tokens: int = UNBOUNDED
    headroom: int = 0
    speculates_by_request: bool = True
    dies_of_unknown_tokens: bool = False
    eos_token_ids: frozenset[int] = frozenset()

    def room(self, num_prompt_tokens: int) -> int:
        """Return how many tokens may follow a prompt: at least 1, so that a prompt without room is refused as such."""
        longest = min(self.context_length, self.max_total_tokens - self.headroom)
        return max(1, longest - num_prompt_tokens)

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
    for reply in request.earlier:
        check_token_ids("request.earlier", reply.token_ids, limits)
    check_params(params, limits.vocab_size)
    _check_choice(params, limits)
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
    for name, bound in BOUNDS.items():
        if not bound.holds(value := getattr(params, name)):
            raise ConfigError(f"rollout.{name}", bound.rule, value, bound.remedy)
    biased = [token for token, _ in params.logit_bias]
    rules = (
        ("max_new_tokens", params.max_new_tokens >= 1, "must be at least 1", "Pass --rollout-max-response-len 1."),
        ("top_k", params.top_k == -1 or params.top_k >= 1, "must be -1 or at least 1", "Pass -1 to keep every token."),
        ("stop", all(params.stop), "must not hold an empty string", "Leave out the empty stop string."),
        ("stop", len(params.stop) <= MAX_STOP_STRINGS, f"must hold at most {MAX_STOP_STRINGS} strings", "Pass fewer."),
        (
            "stop",
            all(len(stop) <= MAX_STOP_CHARS for stop in params.stop),
            f"must hold strings of at most {MAX_STOP_CHARS} characters",
            "Shorten them.",
        ),
        ("stop_token_ids", min(params.stop_token_ids, default=0) >= 0, "must not be negative", "Leave them out."),
        (
            "min_new_tokens",
            0 <= params.min_new_tokens <= params.max_new_tokens,
            f"must be from 0 to max_new_tokens ({params.max_new_tokens})",
            "Lower it.",
        ),
        (
            "logit_bias",
            all(0 <= token < vocab_size and _is_bias(bias) for token, bias in params.logit_bias),
            f"must name tokens from 0 to {vocab_size - 1}, with biases that are numbers of at most {MAX_LOGIT_BIAS:g}",
            "Use the tokenizer of this checkpoint, and smaller biases.",
        ),
        (
            "logit_bias",
            len(set(biased)) == len(biased),
            "must name a token once",
            "Leave out all but one of its biases.",
        ),
    )
    for name, holds, rule, remedy in rules:
        if not holds:
            raise ConfigError(f"rollout.{name}", rule, getattr(params, name), remedy)


def _is_bias(bias: float) -> bool:
    """Return whether a bias can be computed with; -infinity bans its token."""
    return abs(bias) <= MAX_LOGIT_BIAS or bias == -inf


def _check_choice(params: SamplingParams, limits: RequestLimits) -> None:
    """Raise ConfigError where no token is left to choose: a distribution over nothing is NaN."""
    banned = {token for token, bias in params.logit_bias if bias == -inf}
    if params.min_new_tokens:
        banned.update(token for token in limits.eos_token_ids.union(params.stop_token_ids) if token < limits.vocab_size)
    if len(banned) >= limits.vocab_size:
        raise ConfigError(
            "rollout.min_new_tokens" if params.min_new_tokens else "rollout.logit_bias",
            "must leave a token to choose: stop tokens, EOS and biases of -infinity ban the whole vocabulary",
            params.min_new_tokens or len(banned),
            "Ban fewer tokens, or lower min_new_tokens.",
        )
