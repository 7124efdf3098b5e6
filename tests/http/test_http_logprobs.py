"""Logprobs of prompts and of the likeliest tokens are the model's, whatever drafts, samples, chunks and pushes do."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rollout.embedded import prefill
from slime_spec.config.tree import Config
from slime_spec.preflight.requests import RequestLimits
from tests.support.http_server import Served, served

PROMPT = list(b"the cat sat on the mat, the cat sat on the cat")
GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(config: Config) -> Any:
    return AutoModelForCausalLM.from_pretrained(config.model.hf_checkpoint, dtype=torch.float32)


def reference(model: Any, token_ids: list[int]) -> torch.Tensor:
    """log softmax of the token after each position, by transformers."""
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("num_samples", [1, 2])
def test_prompt_logprobs_are_those_of_transformers(server: Served, model: Any, num_samples: int) -> None:
    params = {**GREEDY, "n": num_samples}
    body = {"input_ids": PROMPT, "sampling_params": params, "return_logprob": True, "top_logprobs_num": 3}
    answers = server.generate(**body, logprob_start_len=0)
    expected = reference(model, PROMPT)
    for answer in answers if num_samples > 1 else [answers]:
        info = answer["meta_info"]
        first, *rest = info["input_token_logprobs"]
        assert first == [None, PROMPT[0], None]
        assert [token_id for _, token_id, _ in rest] == PROMPT[1:]
        ours = torch.tensor([logprob for logprob, _, _ in rest])
        torch.testing.assert_close(ours, expected[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0])
        assert info["input_top_logprobs"][0] is None
        top = expected[:-1].topk(3)
        for position, triples in enumerate(info["input_top_logprobs"][1:]):
            assert [token_id for _, token_id, _ in triples] == top.indices[position].tolist()
            assert [logprob for logprob, _, _ in triples] == pytest.approx(top.values[position].tolist(), abs=1e-5)


def test_the_likeliest_tokens_of_a_drafted_reply_are_those_of_transformers(server: Served, model: Any) -> None:
    params = {**GREEDY, "max_new_tokens": 400}
    answer = server.generate(input_ids=PROMPT, sampling_params=params, return_logprob=True, top_logprobs_num=4)
    assert answer["meta_info"]["spec_num_correct_drafts"] > 0
    expected = reference(model, PROMPT + answer["output_ids"])[len(PROMPT) - 1 : -1].topk(4)
    top = answer["meta_info"]["output_top_logprobs"]
    assert [[token_id for _, token_id, _ in each] for each in top] == expected.indices.tolist()
    values = torch.tensor([[logprob for logprob, _, _ in each] for each in top])
    torch.testing.assert_close(values, expected.values)
    assert [each[0][:2] for each in top] == [
        [pytest.approx(logprob, abs=1e-5), token_id]
        for logprob, token_id, _ in answer["meta_info"]["output_token_logprobs"]
    ]
    assert answer["meta_info"]["input_top_logprobs"] == []


def test_the_likeliest_tokens_are_ranked_as_they_are_sampled(server: Served, model: Any) -> None:
    """With temperature, bias and penalties; a token that a bias bans is not among them."""
    banned = {str(token): -1e30 for token in range(3, 256)}
    params = {**GREEDY, "temperature": 0.5, "sampling_seed": 3, "logit_bias": banned, "presence_penalty": 0.7}
    body = {"input_ids": PROMPT, "sampling_params": params, "return_logprob": True, "top_logprobs_num": 2}
    answer = server.generate(**body)
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT + answer["output_ids"]])).logits[0][len(PROMPT) - 1 : -1]
    seen: set[int] = set()
    for position, token in enumerate(answer["output_ids"]):
        allowed = [0, 1, 2, 256]
        row = torch.tensor([logits[position, each] - 0.7 * (each in seen) for each in allowed]) / 0.5
        values, places = row.log_softmax(-1).topk(2)
        triples = answer["meta_info"]["output_top_logprobs"][position]
        assert [token_id for _, token_id, _ in triples] == [allowed[place] for place in places.tolist()]
        assert [logprob for logprob, _, _ in triples] == pytest.approx(values.tolist(), abs=1e-4)
        seen.add(token)


def test_the_logprobs_of_given_tokens_are_those_of_transformers(server: Served, model: Any) -> None:
    """Of prompt and reply, one list for all prompts or one each, whole and in a stream."""
    body = {"sampling_params": GREEDY, "return_logprob": True, "logprob_start_len": 1}
    both = server.generate(input_ids=[PROMPT, PROMPT[:20]], token_ids_logprob=[[7, 104], [0]], **body)
    for answer, prompt, wanted in zip(both, (PROMPT, PROMPT[:20]), ([7, 104], [0]), strict=True):
        expected = reference(model, prompt + answer["output_ids"])[:, wanted]
        of_prompt, of_reply = (answer["meta_info"][f"{side}_token_ids_logprobs"] for side in ("input", "output"))
        assert of_prompt[0] is None
        for row, triples in zip(expected[1:-1], of_prompt[1:] + of_reply, strict=True):
            assert [token_id for _, token_id, _ in triples] == wanted
            assert [logprob for logprob, _, _ in triples] == pytest.approx(row.tolist(), abs=1e-4)
    alike = server.stream(input_ids=PROMPT, token_ids_logprob=[7, 104], **body)[-1]["meta_info"]
    for name in ("input_token_ids_logprobs", "output_token_ids_logprobs"):
        assert alike[name] == both[0]["meta_info"][name]


def test_an_impossible_tokens_logprob_is_null(server: Served) -> None:
    """A reply of at least as many tokens as there are cannot end before."""
    params = {"temperature": 1, "max_new_tokens": 5, "min_new_tokens": 5}
    answer = server.generate(input_ids=PROMPT, sampling_params=params, return_logprob=True, token_ids_logprob=[256])
    assert {each[0][0] for each in answer["meta_info"]["output_token_ids_logprobs"]} == {None}


def test_logprobs_begin_where_they_are_asked_for_and_the_first_has_none(server: Served) -> None:
    body = {"input_ids": PROMPT, "sampling_params": GREEDY, "return_logprob": True}
    whole = server.generate(**body, logprob_start_len=0)["meta_info"]["input_token_logprobs"]
    late = server.generate(**body, logprob_start_len=10)["meta_info"]["input_token_logprobs"]
    assert late == [[None, PROMPT[10], None], *whole[11:]]
    unasked = server.generate(**{**body, "return_logprob": False}, logprob_start_len=0)["meta_info"]
    assert "input_token_logprobs" not in unasked


def test_a_prompt_in_chunks_and_one_that_was_computed_before_have_the_same_logprobs(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = PROMPT * 8
    body = {"input_ids": long, "sampling_params": GREEDY, "return_logprob": True, "logprob_start_len": 0}
    with served(config) as plain:
        whole = plain.generate(**body)["meta_info"]["input_token_logprobs"]
        again = plain.generate(**body)["meta_info"]
    assert again["input_token_logprobs"] == whole
    assert again["cached_tokens"] == 0  # all positions are computed, though a kept prompt begins alike
    monkeypatch.setattr(prefill, "CHUNK_TOKENS_ALONE", 50)
    with served(config) as chunked:
        pieces = chunked.generate(**body)["meta_info"]["input_token_logprobs"]
    assert [logprob for logprob, _, _ in pieces[1:]] == pytest.approx([each[0] for each in whole[1:]], abs=1e-5)


@pytest.mark.parametrize("start", [0, 5])
def test_a_request_that_is_aborted_before_its_prompt_is_computed_has_no_logprobs_of_it(
    own_server: Served, start: int
) -> None:
    own_server.post("/pause_generation", {"mode": "in_place"})
    body = {"input_ids": PROMPT, "rid": "early", "sampling_params": GREEDY, "return_logprob": True}
    body |= {"logprob_start_len": start, "top_logprobs_num": 1, "token_ids_logprob": [1], "return_sampling_mask": True}
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(own_server.generate, **body)
        own_server.wait_for(lambda state: state["num_queue_reqs"] == 1)
        own_server.post("/abort_request", {"rid": "early"})
        info = waiting.result(60)["meta_info"]
    assert info["finish_reason"] == {"type": "abort"}
    assert info["input_token_logprobs"] == [[None, PROMPT[start], None]]
    assert (info["input_top_logprobs"], info["input_token_ids_logprobs"]) == ([None], [None])
    assert "output_token_sampling_mask" not in info


def test_a_stream_shows_them_too(server: Served) -> None:
    body = {"input_ids": PROMPT, "sampling_params": GREEDY, "return_logprob": True, "top_logprobs_num": 2}
    info = server.generate(**body, logprob_start_len=0)["meta_info"]
    last = server.stream(**body, logprob_start_len=0)[-1]["meta_info"]
    for name in ("input_token_logprobs", "input_top_logprobs", "output_token_logprobs", "output_top_logprobs"):
        assert last[name] == info[name]


def test_no_token_is_generated_where_none_is_asked_for(server: Served) -> None:
    params = {"max_new_tokens": 0, "temperature": 0}
    body = {"input_ids": PROMPT, "sampling_params": params, "return_logprob": True, "logprob_start_len": 0}
    answer = server.generate(**body)
    info = answer["meta_info"]
    assert (answer["text"], answer["output_ids"], info["completion_tokens"]) == ("", [], 0)
    assert info["finish_reason"] == {"type": "length", "length": 0}
    assert info["output_token_logprobs"] == []
    assert len(info["input_token_logprobs"]) == len(PROMPT)
    (chunk,) = server.stream(**body)
    assert chunk["output_ids"] == []


def test_as_many_tokens_as_fit_are_no_more_than_the_cache_holds() -> None:
    limits = RequestLimits(vocab_size=10, context_length=100, algorithm="NONE", max_total_tokens=60, headroom=8)
    assert limits.room(20) == 32
    assert limits.room(90) == 1
    assert RequestLimits(vocab_size=10, context_length=100, algorithm="NONE").room(20) == 80
