"""This module reads and checks a request's own speculative fields, in RTP-LLM's spelling.

    {"sp_advice_prompt": "def f(x): ..."}          a text that the reply will resemble; LOOKUP drafts from it
    {"sp_advice_prompt_token_ids": [17, 4, ...]}   the same, tokenised
    {"sp_edit": 1}                                 the advice is an earlier version of the reply: search it forward
    {"force_disable_sp_run": true}                 this request decodes without speculation

The fields come in a body's ``extra_config`` (or ``extra_configs``, or RTP-LLM's own ``generate_config``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from slime_spec.algorithms import find_algorithm, listed, names
from slime_spec.errors import ConfigError
from slime_spec.suggest import did_you_mean
from slime_spec.types import SamplingParams

RTP_OBJECTS = ("extra_config", "extra_configs", "generate_config")
ADVICE, ADVICE_IDS, EDIT, DISABLE, FORCE = RTP_FIELDS = (
    "sp_advice_prompt",
    "sp_advice_prompt_token_ids",
    "sp_edit",
    "force_disable_sp_run",
    "force_sp_accept",
)
CORRECT = "Correct the field or leave it out."


def with_rtp_fields(
    params: SamplingParams, fields: Mapping[str, object], encode: Callable[[str], tuple[int, ...]], prefix: str = ""
) -> SamplingParams:
    """Return ``params`` with the settings in ``fields``; raises ConfigError naming the field.

    ``encode`` makes plain token ids of a text, no BOS before them; null and an absent field mean the same.
    """
    for name in fields:
        if name not in RTP_FIELDS:
            hint = did_you_mean(name, RTP_FIELDS)
            raise ConfigError(
                prefix + name,
                "is not a speculative field of a request",
                fields[name],
                f"{hint}The fields are {', '.join(RTP_FIELDS)}.",
            )
    if _switch(fields, FORCE, prefix):
        raise ConfigError(
            prefix + FORCE,
            "accepting every draft gives a reply that has no target's distribution",
            True,
            "Leave it out.",
        )
    text, token_ids = _text(fields, prefix), _token_ids(fields, prefix)
    if text and token_ids:
        raise ConfigError(
            prefix + ADVICE_IDS, f"is the advice a second time: there is a {ADVICE}", len(token_ids), "Send one."
        )
    return replace(
        params,
        advice_token_ids=encode(text) if text else token_ids or params.advice_token_ids,
        edit=params.edit or _switch(fields, EDIT, prefix),
        speculative=params.speculative and not _switch(fields, DISABLE, prefix),
    )


def check_speculative_params(params: SamplingParams, algorithm: str, vocab_size: int) -> None:
    """Raise ConfigError for a request whose advice the engine's drafter cannot use.

    With ``speculative=False`` advice is allowed everywhere: nothing is drafted.
    """
    advice = params.advice_token_ids
    if (advice or params.edit) and not find_algorithm(algorithm).takes_advice and params.speculative:
        takers = listed(names(lambda each: each.takes_advice))
        raise ConfigError(
            ADVICE if advice else EDIT,
            f"needs speculative.algorithm={takers}, and this engine's is {algorithm}",
            len(advice) if advice else True,
            f"Start the engine with --speculative-algorithm {takers}, or send no advice.",
        )
    if advice and not (min(advice) >= 0 and max(advice) < vocab_size):
        raise ConfigError(
            ADVICE_IDS,
            f"must hold token ids from 0 to {vocab_size - 1}",
            max(advice) if max(advice) >= vocab_size else min(advice),
            "Use the tokenizer of this checkpoint.",
        )


def _switch(fields: Mapping[str, object], name: str, prefix: str) -> bool:
    """Return the switch's value, which RTP-LLM's clients write as a boolean or as 0 or 1."""
    value = fields.get(name)
    if value is None:
        return False
    if value not in (0, 1) or isinstance(value, float):
        raise ConfigError(prefix + name, "must be 0, 1, true or false", value, CORRECT)
    return bool(value)


def _text(fields: Mapping[str, object], prefix: str) -> str:
    value = fields.get(ADVICE)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ConfigError(prefix + ADVICE, "must be a text", value, f"{CORRECT} Token ids go into {ADVICE_IDS}.")
    return value


def _token_ids(fields: Mapping[str, object], prefix: str) -> tuple[int, ...]:
    value = fields.get(ADVICE_IDS)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(each) is int for each in value):
        raise ConfigError(prefix + ADVICE_IDS, "must be a list of whole numbers", value, CORRECT)
    return tuple(value)
