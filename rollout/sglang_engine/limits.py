"""Requests that can never run: a token outside the vocabulary kills the server, so it is refused before it is sent."""

from __future__ import annotations

from slime_spec.algorithms import NONE
from slime_spec.checkpoints.model_files import TargetFiles
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.partial_samples import check_partials
from slime_spec.speculation.request_fields import check_speculative_params
from slime_spec.types import GroupRequest


def check_request(request: GroupRequest, target: TargetFiles, config: Config) -> None:
    """Raise ConfigError naming what is wrong."""
    prompt, params = request.prompt_token_ids, request.params
    if not prompt:
        raise ConfigError("prompt", "must hold at least one token", request.group_id, "Leave out empty prompts.")
    for name, ids in (
        ("prompt", prompt),
        ("rollout.stop_token_ids", params.stop_token_ids),
        ("sampling_params.logit_bias", tuple(token for token, _ in params.logit_bias)),
    ):
        if ids and (min(ids) < 0 or max(ids) >= target.vocab_size):
            bad = next(token for token in ids if not 0 <= token < target.vocab_size)
            raise ConfigError(name, f"must hold token ids from 0 to {target.vocab_size - 1}", bad, "Use this model's.")
    if not request.seeds:
        raise ConfigError("rollout.n_samples_per_prompt", "must be at least 1", 0, "Pass --n-samples-per-prompt 1.")
    check_partials(request, target.vocab_size)
    longest = config.engine.context_length or target.context_length
    total = len(prompt) + params.max_new_tokens
    if total > longest:
        raise ConfigError(
            "engine.context_length",
            f"must hold prompt ({len(prompt)}) plus max_new_tokens ({params.max_new_tokens}) = {total} tokens",
            longest,
            "Shorten the prompt or lower --rollout-max-response-len.",
        )
    check_speculative_params(params, config.speculative.algorithm, target.vocab_size)
    if not params.speculative and config.speculative.record.speculates:
        raise ConfigError(
            "sampling_params.speculative",
            "SGLang speculates for all of a server's requests or for none",
            False,
            f"Pass --speculative-algorithm {NONE.name}, or --rollout-engine embedded.",
        )
