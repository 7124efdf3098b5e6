"""Requests and settings that can never work, refused before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite

import torch

from rollout.embedded.drafters import draft_kv_spec
from rollout.embedded.kv_cache import bytes_per_token
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.tree import Config, EngineConfig
from slime_spec.errors import ConfigError
from slime_spec.partial_samples import check_partials
from slime_spec.sglang.draft_shape import draft_shape
from slime_spec.speculation.request_fields import check_speculative_params
from slime_spec.types import GroupRequest, SamplingParams

MAX_LOGIT_BIAS = 1e30  # divided by the least temperature it is still an fp32 number; -inf bans a token


@dataclass(frozen=True)
class Limits:
    """What one request may ask of the engine; ``headroom`` are the KV positions a row needs beyond its tokens."""

    vocab_size: int
    context_length: int
    max_total_tokens: int
    headroom: int
    algorithm: str


def context_length(config: EngineConfig, spec: ModelSpec) -> int:
    length = config.context_length or spec.max_position_embeddings
    if length > spec.max_position_embeddings:
        raise ConfigError(
            "engine.context_length",
            f"must not exceed the model's max_position_embeddings ({spec.max_position_embeddings})",
            length,
            "Lower --sglang-context-length.",
        )
    return length


def limits_of(config: Config, spec: ModelSpec) -> Limits:
    """What the configuration and the model allow one request; raises ConfigError for a context beyond the model's."""
    speculates = config.speculative.record.speculates
    return Limits(
        vocab_size=spec.vocab_size,
        context_length=context_length(config.engine, spec),
        max_total_tokens=config.engine.max_total_tokens
        or int(config.engine.kv_cache_gb * 1e9 / _kv_bytes(config, spec)),
        headroom=draft_shape(config.speculative, spec.architecture).headroom if speculates else 0,
        algorithm=config.speculative.algorithm,
    )


def check_kv_cache(config: Config, spec: ModelSpec) -> Limits:
    """The limits, if the KV cache holds the longest sequence of the rollout; raises ConfigError if it does not."""
    limits = limits_of(config, spec)
    longest = config.rollout.max_prompt_len + config.rollout.max_response_len + limits.headroom
    if longest <= limits.max_total_tokens:
        return limits
    rule = f"must hold one sequence: max_prompt_len + max_response_len{_drafted(limits)} = {longest} tokens"
    lower = "lower --rollout-max-prompt-len or --rollout-max-response-len."
    if config.engine.max_total_tokens is not None:
        raise ConfigError(
            "engine.max_total_tokens", rule, limits.max_total_tokens, f"Raise --sglang-max-total-tokens, or {lower}"
        )
    needed_gb = longest * _kv_bytes(config, spec) / 1e9
    raise ConfigError(
        "engine.kv_cache_gb",
        f"{rule} take {needed_gb:.3g} GB of KV (the draft's included)",
        config.engine.kv_cache_gb,
        f"Raise engine.kv_cache_gb, or {lower}",
    )


def _drafted(limits: Limits) -> str:
    return f" + {limits.headroom} drafted" if limits.headroom else ""


def _kv_bytes(config: Config, spec: ModelSpec) -> int:
    """Bytes of one position in the target's cache and in the drafter's, which has the same positions."""
    dtype: torch.dtype = getattr(torch, config.engine.dtype)
    draft = draft_kv_spec(config, spec)
    return bytes_per_token(spec, dtype) + (0 if draft is None else bytes_per_token(draft, dtype))


def check_request(request: GroupRequest, limits: Limits) -> None:
    """Raise ConfigError for a request that can never run."""
    prompt, params = request.prompt_token_ids, request.params
    if not prompt:
        raise ConfigError("prompt", "must hold at least one token", request.group_id, "Leave out empty prompts.")
    if min(prompt) < 0 or max(prompt) >= limits.vocab_size:
        raise ConfigError(
            "prompt",
            f"must hold token ids from 0 to {limits.vocab_size - 1}",
            max(prompt) if max(prompt) >= limits.vocab_size else min(prompt),
            "Use the tokenizer of this checkpoint.",
        )
    if not request.seeds:
        raise ConfigError("rollout.n_samples_per_prompt", "must be at least 1", 0, "Pass --n-samples-per-prompt 1.")
    check_partials(request, limits.vocab_size)
    check_params(params, limits.vocab_size)
    check_speculative_params(params, limits.algorithm, limits.vocab_size)
    total = len(prompt) + params.max_new_tokens
    if total > limits.context_length:
        raise ConfigError(
            "engine.context_length",
            f"must hold prompt ({len(prompt)}) plus max_new_tokens ({params.max_new_tokens}) = {total} tokens",
            limits.context_length,
            "Shorten the prompt or lower --rollout-max-response-len.",
        )
    if total + limits.headroom > limits.max_total_tokens:
        raise ConfigError(
            "engine.max_total_tokens",
            f"must hold at least one sequence of this request ({total} tokens{_drafted(limits)})",
            limits.max_total_tokens,
            "Raise --sglang-max-total-tokens or engine.kv_cache_gb.",
        )


def check_params(params: SamplingParams, vocab_size: int) -> None:
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
