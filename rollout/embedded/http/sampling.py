"""Sampling parameters are read out of a body, and parameters that this engine does not serve are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rollout.embedded.http.json_io import Fields, as_object, finite
from rollout.embedded.verification.distributions import is_filtered
from slime_spec.errors import ConfigError
from slime_spec.preflight.requests import RequestLimits
from slime_spec.types import SamplingParams, is_greedy

_FIELDS = {
    "this engine reads text only": """
        input_embeds image_data video_data audio_data mm_hashes mm_content_hashes use_audio_in_video video_config
        modalities max_dynamic_patch min_dynamic_patch image_max_dynamic_patch video_max_dynamic_patch images_config
        return_bytes positional_embed_overrides""",
    "logprobs are those of the tokens themselves, of the likeliest, and of token_ids_logprob": """
        return_entropy return_flat_raw_top_logprobs return_flat_raw_top_logprobs_b64""",
    "this engine returns tokens, text and logprobs only": """
        return_hidden_states return_routed_experts routed_experts_start_len return_indexer_topk
        multi_item_delimiter_indices token_indices_to_pool""",
    "this engine serves one set of weights": "lora_path lora_id",
    "nothing that was pickled is loaded here": "custom_logit_processor",
    "this engine is one process, prefill and decode together": """
        bootstrap_host bootstrap_port bootstrap_room bootstrap_pair_key decode_tp_size disagg_prefill_dp_rank
        routed_dp_rank data_parallel_rank kv_hints""",
    "this engine keeps nothing from one request to the next": "session_params background",
    "this engine has no notion of reasoning": "require_reasoning max_thinking_tokens",
}
_PARAMETERS = {
    "constrained decoding is not served": "json_schema regex ebnf structural_tag",
    "stop takes texts, stop_token_ids tokens": "stop_regex",
    "there is no beam search": "beam_width",
}
# Values, besides null, false, zero and emptiness, by which a request asks for nothing.
_NEUTRAL: Mapping[str, Any] = {"beam_width": 1}
PREFIX = "sampling_params."
SEED_BITS = 63
LONGEST_KEY = 20  # digits of a token id; Python refuses to read thousands of them
DISTRIBUTION = ("temperature", "top_p", "top_k", "min_p", "logit_bias", "n", "sampling_seed")
PENALTIES = ("frequency_penalty", "presence_penalty", "repetition_penalty")
LENGTH = ("max_new_tokens", "min_new_tokens", "stop", "stop_token_ids", "ignore_eos")
# Fast tokenizers, the only ones here, put no spaces between special tokens whatever is asked of them.
WRITING = ("skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim", "stream_interval")


def _by_name(reasons: Mapping[str, str]) -> Mapping[str, str]:
    return {name: reason for reason, names in reasons.items() for name in names.split()}


UNSERVED_FIELDS = _by_name(_FIELDS)
UNSERVED_PARAMETERS = _by_name(_PARAMETERS)
CUSTOM, KEPT = "custom_params", "return_top_p_token_ids"
KNOWN = frozenset((*DISTRIBUTION, *PENALTIES, *LENGTH, *WRITING, CUSTOM, *UNSERVED_PARAMETERS))


def check_unserved(data: Mapping[str, Any], reasons: Mapping[str, str], prefix: str = "") -> None:
    """Raise ConfigError for the first field of ``reasons`` by which ``data`` asks for something."""
    for name, value in data.items():
        if name in reasons and not _asks_for_nothing(value) and value != _NEUTRAL.get(name):
            raise ConfigError(prefix + name, f"is not served: {reasons[name]}", value, "Leave it out.")


def _asks_for_nothing(value: object) -> bool:
    """Return whether a value is null, false, zero or empty, or a list (one entry a prompt) of these."""
    return not value or (isinstance(value, list) and not any(value))


@dataclass(frozen=True)
class Sampling:
    """Holds one prompt's sampling: ``num_samples`` responses, whose seeds derive from ``seed`` where one is given.

    ``prefill_only``: no token is wanted (``max_new_tokens: 0``); the engine makes one, which nobody is shown.
    ``returns_kept``: the tokens that top-k, top-p and min-p kept are wanted, and logprobs among them (slime's replay).
    """

    params: SamplingParams
    num_samples: int
    seed: int | None
    skip_special_tokens: bool
    trim_stop: bool
    stream_interval: int
    prefill_only: bool = False
    returns_kept: bool = False

    @cached_property
    def stop_token_ids(self) -> frozenset[int]:
        """Return the stop tokens as a set, which all samples of the request share."""
        return frozenset(self.params.stop_token_ids)


def read_sampling(data: Mapping[str, Any], limits: RequestLimits, num_prompt_tokens: int) -> Sampling:
    """Read ``sampling_params``; raises ConfigError naming the parameter. Bounds are checked with the whole request.

    ``max_new_tokens: null`` means as many as the context holds.
    """
    fields = Fields(data, PREFIX)
    fields.check_names(KNOWN)
    check_unserved(data, UNSERVED_PARAMETERS, PREFIX)
    unbounded = "max_new_tokens" in data and data["max_new_tokens"] is None
    room = limits.room(num_prompt_tokens)
    num_new = room if unbounded else fields.count("max_new_tokens", 128, minimum=0)
    params = SamplingParams(
        max_new_tokens=max(1, num_new),
        min_new_tokens=fields.count("min_new_tokens", 0, minimum=0),
        temperature=fields.number("temperature", 1.0),
        top_p=fields.number("top_p", 1.0),
        top_k=_top_k(fields.whole("top_k", -1), limits.vocab_size),
        min_p=fields.number("min_p", 0.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0),
        presence_penalty=fields.number("presence_penalty", 0.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0),
        stop=fields.texts("stop"),
        stop_token_ids=tuple({each: None for each in fields.wholes("stop_token_ids") if 0 <= each < limits.vocab_size}),
        ignore_eos=fields.switch("ignore_eos"),
        logit_bias=_logit_bias(fields.raw("logit_bias"), limits.vocab_size),
    )
    return Sampling(
        params=params,
        num_samples=fields.count("n", 1),
        seed=None if fields.raw("sampling_seed") is None else fields.whole("sampling_seed", 0) % (1 << SEED_BITS),
        skip_special_tokens=fields.switch("skip_special_tokens", True),
        trim_stop=not fields.switch("no_stop_trim"),
        stream_interval=fields.count("stream_interval", 1),
        prefill_only=not num_new,
        returns_kept=_returns_kept(fields.raw(CUSTOM), params),
    )


def _returns_kept(custom_params: object, params: SamplingParams) -> bool:
    """Return whether kept tokens are wanted; where all are kept, slime's SGLang returns none either."""
    if not custom_params:
        return False
    fields = Fields(as_object(custom_params, PREFIX + CUSTOM), f"{PREFIX}{CUSTOM}.")
    fields.check_names({KEPT})
    return fields.switch(KEPT) and (is_greedy(params.temperature) or is_filtered(params))


def _top_k(top_k: int, vocab_size: int) -> int:
    """Return ``top_k``, -1 for all: SGLang's clients also write "all" as a number beyond every vocabulary."""
    return -1 if top_k >= vocab_size else top_k


def _logit_bias(value: object, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """Return ``{"17": -5.0}`` as pairs; JSON has no whole numbers as keys."""
    if value is None:
        return ()
    name, remedy = PREFIX + "logit_bias", 'Send {"TOKEN_ID": BIAS}.'
    if not isinstance(value, dict):
        raise ConfigError(name, "must be an object from token ids to numbers", value, remedy)
    pairs = []
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= LONGEST_KEY and int(key) < vocab_size):
            raise ConfigError(name, f"must have token ids from 0 to {vocab_size - 1} as keys", key, remedy)
        if (number := finite(bias)) is None:
            raise ConfigError(name, "must have finite numbers as values", bias, remedy)
        pairs.append((int(key), number))
    return tuple(pairs)
