"""A request's speculation in RTP-LLM's spelling."""

from __future__ import annotations

import pytest

from slime_spec.errors import ConfigError
from slime_spec.speculation.request_fields import check_speculative_params, with_rtp_fields
from slime_spec.types import SamplingParams

PLAIN = SamplingParams(max_new_tokens=7, temperature=0.5)


def encode(text: str) -> tuple[int, ...]:
    encoded.append(text)
    return tuple(text.encode())


encoded: list[str] = []


def read(**fields: object) -> SamplingParams:
    encoded.clear()
    return with_rtp_fields(PLAIN, fields, encode, "extra_config.")


def test_advice_text_is_tokenised_once_and_the_rest_is_untouched() -> None:
    assert read(sp_advice_prompt="ab", sp_edit=1) == SamplingParams(
        max_new_tokens=7, temperature=0.5, advice_token_ids=(97, 98), edit=True
    )
    assert encoded == ["ab"]


def test_advice_may_come_tokenised() -> None:
    assert read(sp_advice_prompt="", sp_advice_prompt_token_ids=[5, 6]).advice_token_ids == (5, 6)
    assert encoded == []


@pytest.mark.parametrize(("spelled", "edit"), [(0, False), (1, True), (True, True), (False, False), (None, False)])
def test_switches_are_numbers_or_booleans(spelled: object, edit: bool) -> None:
    assert read(sp_edit=spelled).edit is edit
    assert read(force_disable_sp_run=spelled).speculative is not edit


def test_nothing_said_changes_nothing() -> None:
    assert read() == read(force_sp_accept=False, sp_advice_prompt_token_ids=None) == PLAIN


@pytest.mark.parametrize(
    ("fields", "name", "words"),
    [
        ({"sp_advise_prompt": "x"}, "sp_advise_prompt", "Did you mean sp_advice_prompt?"),
        ({"sp_edit": 2}, "sp_edit", "0, 1, true or false"),
        ({"sp_edit": "1"}, "sp_edit", "0, 1, true or false"),
        ({"sp_edit": 1.0}, "sp_edit", "0, 1, true or false"),
        ({"force_sp_accept": True}, "force_sp_accept", "no target's distribution"),
        ({"sp_advice_prompt": [1]}, "sp_advice_prompt", "sp_advice_prompt_token_ids"),
        ({"sp_advice_prompt_token_ids": "1"}, "sp_advice_prompt_token_ids", "list of whole numbers"),
        ({"sp_advice_prompt_token_ids": [1, True]}, "sp_advice_prompt_token_ids", "list of whole numbers"),
        (
            {"sp_advice_prompt": "x", "sp_advice_prompt_token_ids": [1]},
            "sp_advice_prompt_token_ids",
            "a second time",
        ),
    ],
)
def test_a_wrong_field_is_refused_by_its_name(fields: dict[str, object], name: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(**fields)
    assert caught.value.setting == f"extra_config.{name}"
    assert words in str(caught.value)


@pytest.mark.parametrize("algorithm", ["NONE", "HISTORY", "NGRAM", "EAGLE3"])
def test_advice_and_edit_need_lookup_unless_the_request_does_not_speculate(algorithm: str) -> None:
    for params in (SamplingParams(advice_token_ids=(1,)), SamplingParams(edit=True)):
        check_speculative_params(params, "LOOKUP", 10)
        with pytest.raises(ConfigError, match=r"needs speculative\.algorithm=LOOKUP"):
            check_speculative_params(params, algorithm, 10)
    check_speculative_params(SamplingParams(advice_token_ids=(1,), edit=True, speculative=False), algorithm, 10)
    check_speculative_params(SamplingParams(), algorithm, 10)


@pytest.mark.parametrize("token_id", [-1, 10])
def test_advice_outside_the_vocabulary_is_refused(token_id: int) -> None:
    with pytest.raises(ConfigError) as caught:
        check_speculative_params(SamplingParams(advice_token_ids=(3, token_id)), "LOOKUP", 10)
    assert caught.value.value == token_id
