"""RTP-LLM's spelling on /generate: aux_info, advice, edits, and no speculation for one request."""

from typing import Any

import pytest

from rollout.embedded.http.calls import CallReader
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.tree import Config
from slime_spec.preflight.requests import RequestLimits
from tests.support.http_server import Served

GREEDY = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}
PROMPT = "one two three"


def generate(server: Served, **body: Any) -> dict[str, Any]:
    answer: dict[str, Any] = server.generate(text=PROMPT, sampling_params=GREEDY, **body)
    return answer


@pytest.mark.parametrize("where", [{"aux_info": True}, {"generate_config": {"aux_info": True}}])
def test_aux_info_is_there_when_asked_for_and_its_counters_add_up(server: Served, where: dict[str, Any]) -> None:
    assert "aux_info" not in generate(server)
    answer = generate(server, **where)
    aux, info = answer["aux_info"], answer["meta_info"]
    assert (aux["input_len"], aux["output_len"]) == (info["prompt_tokens"], 40)
    assert aux["iter_count"] == 1 + info["spec_verify_ct"]
    assert aux["speculative_draft_rounds"] == info["spec_verify_ct"]
    assert sum(aux["speculative_accepted_tokens_per_pos"]) == info["spec_num_correct_drafts"]
    assert aux["cost_time"] == pytest.approx(1000 * info["e2e_latency"])


@pytest.mark.parametrize("edit", [0, 1])
def test_advice_makes_the_same_reply_in_fewer_rounds(server: Served, edit: int) -> None:
    plain = generate(server, aux_info=True)
    advice = {"sp_advice_prompt_token_ids": plain["output_ids"], "sp_edit": edit}
    advised = generate(server, aux_info=True, extra_config=advice)
    assert advised["output_ids"] == plain["output_ids"]
    assert advised["aux_info"]["iter_count"] < plain["aux_info"]["iter_count"]
    assert advised["meta_info"]["spec_accept_length"] > 4


def test_advice_may_be_a_text_and_one_a_prompt(config: Config) -> None:
    tokenizer = Tokenizer.load(config.model.hf_checkpoint)
    limits = RequestLimits(vocab_size=257, context_length=200, max_total_tokens=1000, headroom=0, algorithm="LOOKUP")
    reader = CallReader(limits, tokenizer, server_seed=0, max_samples=4096)
    call = reader.read({"text": ["a", "b"], "extra_configs": [{"sp_advice_prompt": "né", "sp_edit": 1}, None]})
    first, second = (prompt.request.params for prompt in call.prompts)
    assert (first.advice_token_ids, first.edit) == (tokenizer.encode("né", special=False), True)
    assert (second.advice_token_ids, second.edit, second.speculative) == ((), False, True)
    merged = reader.read({"text": "a", "generate_config": {"sp_edit": True}, "extra_config": {"aux_info": True}})
    assert (merged.aux_info, merged.prompts[0].request.params.edit) == (True, True)


def test_one_request_can_do_without_speculation(server: Served) -> None:
    with_drafts = generate(server, aux_info=True)
    without = generate(server, aux_info=True, extra_config={"force_disable_sp_run": True})
    assert without["output_ids"] == with_drafts["output_ids"]
    assert without["aux_info"]["iter_count"] == 40
    assert "spec_verify_ct" not in without["meta_info"]
