"""This module computes a request's limits in the embedded engine from the configuration and the model's shape alone."""

from __future__ import annotations

import torch

from rollout.embedded.drafters import draft_kv_spec
from rollout.embedded.kv_cache import bytes_per_token, routing_bytes_per_token
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.tree import Config, EngineConfig
from slime_spec.errors import ConfigError
from slime_spec.preflight.requests import RequestLimits
from slime_spec.preflight.routing import replayed_experts
from slime_spec.sglang.draft_shape import embedded_shape


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


def limits_of(config: Config, spec: ModelSpec) -> RequestLimits:
    """Return the limits of one request by configuration and model.

    Raises ConfigError for a context beyond the model's.
    """
    speculates = config.speculative.record.speculates
    return RequestLimits(
        vocab_size=spec.vocab_size,
        context_length=context_length(config.engine, spec),
        max_total_tokens=config.engine.max_total_tokens
        or int(config.engine.kv_cache_gb * 1e9 / _kv_bytes(config, spec)),
        headroom=embedded_shape(config.speculative, spec.architecture).headroom if speculates else 0,
        algorithm=config.speculative.algorithm,
    )


def check_kv_cache(config: Config, spec: ModelSpec) -> RequestLimits:
    """Return the limits; raises ConfigError where the KV cache does not hold the rollout's longest sequence."""
    limits = limits_of(config, spec)
    longest = config.longest + limits.headroom
    if longest <= limits.max_total_tokens:
        return limits
    rule = f"must hold one sequence: {config.longest_is}{limits.drafted} = {longest} tokens"
    lower = f"lower {config.flags_of_longest}."
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


def _kv_bytes(config: Config, spec: ModelSpec) -> int:
    """Return the bytes of one position in the target's cache and the drafter's, which has the same positions.

    Where routing is replayed, the target's has the position's experts, too.
    """
    dtype: torch.dtype = getattr(torch, config.engine.dtype)
    draft = draft_kv_spec(config, spec)
    of_target = bytes_per_token(spec, dtype) + routing_bytes_per_token(spec, replayed_experts(config, spec))
    return of_target + (0 if draft is None else bytes_per_token(draft, dtype))
