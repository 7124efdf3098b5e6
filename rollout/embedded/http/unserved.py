"""What SGLang's requests can ask for and this engine does not have, each name with the reason that a refusal gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rollout.embedded.http.fields import bad_field

_FIELDS = {
    "this engine reads text only": """
        input_embeds image_data video_data audio_data mm_hashes mm_content_hashes use_audio_in_video video_config
        modalities max_dynamic_patch min_dynamic_patch image_max_dynamic_patch video_max_dynamic_patch images_config
        return_bytes positional_embed_overrides""",
    "only the logprobs of generated tokens are kept": """
        top_logprobs_num token_ids_logprob return_sampling_mask sampling_logprobs_mode return_entropy
        return_flat_raw_top_logprobs return_flat_raw_top_logprobs_b64""",
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
    "there are no custom logit processors": "custom_params",
    "there is no beam search": "beam_width",
}
# Values, besides null, false, zero and emptiness, by which a request asks for nothing.
_NEUTRAL: Mapping[str, Any] = {"beam_width": 1}


def _by_name(reasons: Mapping[str, str]) -> Mapping[str, str]:
    return {name: reason for reason, names in reasons.items() for name in names.split()}


UNSERVED_FIELDS = _by_name(_FIELDS)
UNSERVED_PARAMETERS = _by_name(_PARAMETERS)


def check_unserved(data: Mapping[str, Any], reasons: Mapping[str, str], prefix: str = "") -> None:
    """Raise ConfigError for the first field of ``reasons`` by which ``data`` asks for something."""
    for name, value in data.items():
        if name in reasons and not _asks_for_nothing(value) and value != _NEUTRAL.get(name):
            raise bad_field(prefix + name, f"is not served: {reasons[name]}", value, "Leave it out.")


def _asks_for_nothing(value: object) -> bool:
    """Null, false, zero, what is empty, and lists (one entry a prompt) of these."""
    return not value or (isinstance(value, list) and all(map(_asks_for_nothing, value)))
