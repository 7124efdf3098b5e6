"""POST /generate answers as SGLang does: shapes, order, seeds, logprobs, stops."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.tree import Config
from slime_spec.types import GroupRequest
from tests.support.embedded_harness import greedy, make_core, run
from tests.support.http_server import Served

GREEDY = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
PROMPTS = ["the cat sat on the cat sat on", "2 + 3 =", "abcabcabcabc"]
# What SGLang 0.5.21 puts into an answer without logprobs, and what it adds once a verify round ran.
PLAIN_KEYS = {"id", "finish_reason", "prompt_tokens", "completion_tokens", "cached_tokens", "weight_version"}
PLAIN_KEYS |= {"weight_versions", "e2e_latency"}
SPEC_KEYS = {"spec_verify_ct", "spec_accept_rate", "spec_accept_length", "spec_num_correct_drafts"}
SPEC_KEYS |= {"spec_num_proposed_drafts", "spec_correct_drafts_histogram"}


@pytest.fixture(scope="module")
def tokenizer(config: Config) -> Tokenizer:
    return Tokenizer.load(config.model.hf_checkpoint)


def test_an_answer_has_sglangs_shape(server: Served, tokenizer: Tokenizer) -> None:
    answer = server.generate(text=PROMPTS[0], sampling_params=GREEDY, rid="mine")
    info = answer["meta_info"]
    assert answer.keys() == {"text", "output_ids", "meta_info"}
    assert answer["text"] == tokenizer.decode(answer["output_ids"])
    assert info.keys() >= PLAIN_KEYS | SPEC_KEYS
    assert not any("logprob" in key for key in info)
    assert info["id"] == "mine"
    assert info["finish_reason"] == {"type": "length", "length": 24}
    assert info["prompt_tokens"] == len(tokenizer.encode(PROMPTS[0]))
    assert info["completion_tokens"] == len(answer["output_ids"]) == 24
    assert info["weight_version"] == "default"
    assert info["weight_versions"] == [{"version": "default", "start": 0, "end": 24}]
    assert 1 + info["spec_verify_ct"] + info["spec_num_correct_drafts"] >= 24
    assert sum(info["spec_correct_drafts_histogram"]) == info["spec_verify_ct"]
    assert info["e2e_latency"] > 0


def test_text_and_its_token_ids_are_the_same_request(config: Config, server: Served, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPTS[1])
    by_text = server.generate(text=PROMPTS[1], sampling_params=GREEDY)
    by_ids = server.generate(input_ids=list(ids), sampling_params=GREEDY)
    alone = run(make_core(config), [GroupRequest("g", ids, (0,), greedy(24, ignore_eos=True))])["g", 0]
    assert by_text["output_ids"] == by_ids["output_ids"] == list(alone.token_ids)


def test_put_is_post(server: Served) -> None:
    import requests

    body = {"text": PROMPTS[1], "sampling_params": GREEDY}
    answer = requests.put(f"{server.url}/generate", json=body, timeout=60).json()
    assert answer["output_ids"] == server.generate(**body)["output_ids"]


def test_a_batch_is_answered_in_its_order(server: Served) -> None:
    alone = [server.generate(text=prompt, sampling_params=GREEDY)["output_ids"] for prompt in PROMPTS]
    lengths = [{**GREEDY, "max_new_tokens": count} for count in (24, 3, 11)]
    batch = server.generate(text=PROMPTS, sampling_params=lengths, rid=["a", "b", "c"])
    assert [answer["output_ids"] for answer in batch] == [alone[0], alone[1][:3], alone[2][:11]]
    assert [answer["meta_info"]["id"] for answer in batch] == ["a", "b", "c"]
    one = server.generate(text=PROMPTS[:1], sampling_params=GREEDY, rid="base")
    assert [answer["meta_info"]["id"] for answer in one] == ["base_0"]


def test_the_samples_of_a_prompt_stand_side_by_side_and_share_its_kv(server: Served) -> None:
    params = {"max_new_tokens": 12, "temperature": 1.0, "n": 3, "sampling_seed": 5, "ignore_eos": True}
    answers = server.generate(text=PROMPTS[:2], sampling_params=params)
    assert len(answers) == 6
    lengths = [answer["meta_info"]["prompt_tokens"] for answer in answers]
    assert lengths == [lengths[0]] * 3 + [lengths[3]] * 3
    assert lengths[0] != lengths[3]
    assert len({tuple(answer["output_ids"]) for answer in answers[:3]}) == 3
    assert len({answer["meta_info"]["id"] for answer in answers}) == 6
    assert answers[1]["meta_info"]["cached_tokens"] == lengths[0]
    one = server.generate(text=PROMPTS[0], sampling_params={**params, "n": 1})
    assert one["output_ids"] == answers[0]["output_ids"]


def test_a_seed_names_one_output_and_without_one_every_request_differs(server: Served) -> None:
    params = {"max_new_tokens": 16, "temperature": 1.0, "ignore_eos": True}

    def output(**more: Any) -> list[int]:
        return server.generate(text=PROMPTS[1], sampling_params={**params, **more})["output_ids"]

    assert output(sampling_seed=7) == output(sampling_seed=7)
    assert output(sampling_seed=7) != output(sampling_seed=8)
    assert output(sampling_seed=-1) == output(sampling_seed=-1)
    assert output() != output()


def test_two_servers_of_one_seed_draw_the_same_unseeded_samples(config: Config) -> None:
    from tests.support.http_server import served

    drawn = []
    for _ in range(2):
        with served(config) as each:
            params = {"max_new_tokens": 8, "ignore_eos": True}
            drawn.append([each.generate(text="x", sampling_params=params)["output_ids"] for _ in range(2)])
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][1]


def test_clients_at_once_get_the_tokens_they_get_alone(server: Served) -> None:
    def body(index: int) -> dict[str, Any]:
        params = {"max_new_tokens": 30, "temperature": 1.0, "sampling_seed": index, "ignore_eos": True}
        return {"text": PROMPTS[index % 3], "sampling_params": params, "return_logprob": True}

    alone = [server.generate(**body(index)) for index in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda index: server.generate(**body(index)), range(8)))
    assert [answer["output_ids"] for answer in together] == [answer["output_ids"] for answer in alone]


def test_logprobs_are_triples_of_the_targets_logprob_the_token_and_its_text(config: Config, server: Served) -> None:
    ids = (10, 20, 30)
    body = {"input_ids": [10, 20, 30], "sampling_params": GREEDY, "return_logprob": True}
    info = server.generate(**body)["meta_info"]
    alone = run(make_core(config), [GroupRequest("g", ids, (0,), greedy(24, ignore_eos=True))])["g", 0]
    triples = info["output_token_logprobs"]
    assert [token_id for _, token_id, _ in triples] == list(alone.token_ids)
    assert [logprob for logprob, _, _ in triples] == pytest.approx(alone.logprobs, abs=1e-5)
    assert {text for _, _, text in triples} == {None}
    assert info["input_token_logprobs"] == []
    assert info["output_token_logprobs_length"] == 24
    answer = server.generate(**body, return_text_in_logprobs=True, return_prompt_token_ids=True)
    assert "".join(text for _, _, text in answer["meta_info"]["output_token_logprobs"] if "\ufffd" not in text)
    assert answer["prompt_token_ids"] == [10, 20, 30]
    at_the_end = server.generate(**body, logprob_start_len=3)
    assert at_the_end["meta_info"]["output_token_logprobs"] == triples


def test_a_batch_may_ask_for_logprobs_of_some(server: Served) -> None:
    answers = server.generate(text=PROMPTS[:2], sampling_params=GREEDY, return_logprob=[False, True])
    assert ["output_token_logprobs" in answer["meta_info"] for answer in answers] == [False, True]


def test_a_stop_string_is_cut_off_the_text_and_not_off_the_tokens(server: Served) -> None:
    whole = server.generate(text=PROMPTS[0], sampling_params=GREEDY)
    stop = whole["text"][6:9]
    first = whole["text"].index(stop)
    answer = server.generate(text=PROMPTS[0], sampling_params={**GREEDY, "stop": stop})
    assert answer["text"] == whole["text"][:first]
    assert answer["output_ids"] == whole["output_ids"][: len(answer["output_ids"])]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    kept = server.generate(text=PROMPTS[0], sampling_params={**GREEDY, "stop": ["never", stop], "no_stop_trim": True})
    assert kept["text"] == whole["text"][: first + len(stop)]


def test_a_stop_token_stays_in_the_ids_and_not_in_the_text(server: Served, tokenizer: Tokenizer) -> None:
    whole = server.generate(text=PROMPTS[0], sampling_params=GREEDY)["output_ids"]
    stop = whole[5]
    cut = whole[: whole.index(stop) + 1]
    answer = server.generate(text=PROMPTS[0], sampling_params={**GREEDY, "stop_token_ids": [stop]})
    assert answer["output_ids"] == cut
    assert answer["text"] == tokenizer.decode(cut[:-1])
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    kept = server.generate(text=PROMPTS[0], sampling_params={**GREEDY, "stop_token_ids": [stop], "no_stop_trim": True})
    assert kept["text"] == tokenizer.decode(cut)


def test_null_means_the_default_and_no_bound_means_the_context(config: Config, server: Served) -> None:
    nulls = dict.fromkeys(("top_p", "top_k", "min_p", "stop", "stop_token_ids", "logit_bias", "n", "sampling_seed"))
    answer = server.generate(text="abc", sampling_params={**GREEDY, **nulls}, return_logprob=None, image_data=None)
    assert answer["output_ids"] == server.generate(text="abc", sampling_params=GREEDY)["output_ids"]
    default = server.generate(text="abc", sampling_params={"temperature": 0, "ignore_eos": True})
    assert default["meta_info"]["completion_tokens"] == 128


def test_a_logit_bias_bends_the_choice(server: Served) -> None:
    answer = server.generate(text="abc", sampling_params={**GREEDY, "logit_bias": {"65": 1e4}})
    assert set(answer["output_ids"]) == {65}
