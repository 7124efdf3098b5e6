"""``limits_of`` says what one request may ask of an SGLang server, which dies of tokens that it does not know."""

from __future__ import annotations

from slime_spec.checkpoints.model_files import TargetFiles
from slime_spec.config.tree import Config
from slime_spec.preflight.requests import RequestLimits


def limits_of(config: Config, target: TargetFiles, eos_token_ids: frozenset[int]) -> RequestLimits:
    """Return a request's limits: the server's context length, but not its KV cache, where requests wait for room."""
    return RequestLimits(
        vocab_size=target.vocab_size,
        context_length=config.engine.context_length or target.context_length,
        algorithm=config.speculative.algorithm,
        speculates_by_request=not config.speculative.record.speculates,
        dies_of_unknown_tokens=True,
        eos_token_ids=eos_token_ids,
    )
