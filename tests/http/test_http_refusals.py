"""What a client does wrong is a 400 that names the field; nothing it sends ends the server."""

import re
from typing import Any

import pytest
import requests

from rollout.embedded.http.calls import CallReader
from rollout.embedded.http.sampling import UNSERVED_FIELDS, UNSERVED_PARAMETERS, read_sampling
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.files import parse_json
from slime_spec.preflight.requests import RequestLimits
from tests.support.http_server import Served, served

LIMITS = RequestLimits(vocab_size=257, context_length=200, max_total_tokens=1000, headroom=0, algorithm="NGRAM")
BAD_PARAMETERS: list[tuple[dict[str, Any], str]] = [
    ({"temprature": 1}, "sampling_params.temprature.*Did you mean temperature"),
    ({"temperature": "hot"}, "sampling_params.temperature"),
    ({"temperature": -1}, "sampling_params.temperature"),
    ({"temperature": True}, "sampling_params.temperature"),
    ({"top_p": 0}, "sampling_params.top_p"),
    ({"top_k": 0}, "sampling_params.top_k"),
    ({"top_k": 1.5}, "sampling_params.top_k"),
    ({"min_p": 2}, "sampling_params.min_p"),
    ({"max_new_tokens": -1}, "sampling_params.max_new_tokens"),
    ({"max_new_tokens": 1000}, "engine.context_length"),
    ({"min_new_tokens": 9, "max_new_tokens": 8}, "sampling_params.min_new_tokens"),
    ({"frequency_penalty": 3}, "sampling_params.frequency_penalty"),
    ({"presence_penalty": -3}, "sampling_params.presence_penalty"),
    ({"repetition_penalty": 0}, "sampling_params.repetition_penalty"),
    ({"stop": [1]}, "sampling_params.stop"),
    ({"stop": ""}, "sampling_params.stop"),
    ({"stop": ["a"] * 33}, "at most 32"),
    ({"stop_token_ids": [True]}, "sampling_params.stop_token_ids"),
    ({"logit_bias": {"257": 1}}, "sampling_params.logit_bias.*0 to 256"),
    ({"logit_bias": {"-1": 1}}, "sampling_params.logit_bias"),
    ({"logit_bias": {"9" * 5000: 1}}, "sampling_params.logit_bias.*0 to 256"),
    ({"logit_bias": {"1": "a"}}, "sampling_params.logit_bias"),
    ({"logit_bias": [1]}, "sampling_params.logit_bias"),
    ({"logit_bias": {"1": 10**400}}, "sampling_params.logit_bias"),
    ({"logit_bias": {"1": float("nan")}}, "sampling_params.logit_bias"),
    ({"temperature": float("inf")}, "sampling_params.temperature"),
    ({"temperature": 10**400}, "sampling_params.temperature"),
    ({"stop": "\ud800"}, "sampling_params.stop"),
    ({"temperature": 1e300}, "sampling_params.temperature.*at most 1e.30"),
    ({"repetition_penalty": 1e-300}, "sampling_params.repetition_penalty.*at least 1e-09"),
    ({"logit_bias": {"1": 1e31}}, "sampling_params.logit_bias"),
    ({"logit_bias": {"5": 1, "05": 1}}, "sampling_params.logit_bias.*once"),
    ({"logit_bias": {"\u0661": 1}}, "sampling_params.logit_bias.*0 to 256"),
    ({"min_new_tokens": 1, "stop_token_ids": list(range(257))}, "sampling_params.min_new_tokens.*must leave a token"),
    ({"max_new_tokens": 10**4299}, "sampling_params.max_new_tokens"),
    ({"max_new_tokens": 10**4299, "min_new_tokens": 10**4299}, "sampling_params.m.._new_tokens"),
    ({"n": 10**4299}, "sampling_params.n"),
    ({"stop": "a" * 2000}, "sampling_params.stop.*at most 1024 characters"),
    ({"n": 0}, "sampling_params.n"),
    ({"n": 5000}, "sampling_params.n"),
    ({"sampling_seed": "a"}, "sampling_params.sampling_seed"),
    ({"ignore_eos": 1}, "sampling_params.ignore_eos"),
    ({"custom_params": [1]}, "sampling_params.custom_params: must be a JSON object"),
    ({"custom_params": {"thinking_budget": 5}}, "sampling_params.custom_params.thinking_budget"),
    ({"custom_params": {"return_top_p_token_ids": "yes"}}, "custom_params.return_top_p_token_ids"),
]
BAD_BODIES: list[tuple[Any, str]] = [
    ([1], "body: must be a JSON object"),
    ({}, "either text or input_ids"),
    ({"text": "a", "input_ids": [1]}, "either text or input_ids"),
    ({"text": 1}, "text: "),
    ({"text": []}, "text: "),
    ({"text": "half a pair \ud83d"}, "text: "),
    ({"input_ids": []}, "at least one token"),
    ({"input_ids": [[1], 2]}, "input_ids: "),
    ({"input_ids": [1.5]}, "input_ids: "),
    ({"input_ids": [[1], ["a"]]}, "input_ids: "),
    ({"input_ids": [400]}, "0 to 256"),
    ({"text": "a", "txt": "b"}, "txt.*Did you mean text"),
    ({"text": "a", "sampling_params": 3}, "sampling_params: must be a JSON object"),
    ({"text": ["a", "b"], "sampling_params": [{}]}, "each of the 2 prompts"),
    ({"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]}, "sampling_params.n"),
    ({"text": "a", "rid": 5}, "rid: "),
    ({"text": "a", "rid": ""}, "rid: "),
    ({"text": ["a", "b"], "rid": ["x", "x"]}, "same id twice"),
    ({"text": ["a", "b"], "rid": ["x"]}, "each of the 2 prompts"),
    ({"text": "a", "return_logprob": "yes"}, "return_logprob"),
    ({"text": "a", "return_logprob": True, "logprob_start_len": -2}, "logprob_start_len: .* from -1 to 1"),
    ({"text": "a", "return_logprob": True, "logprob_start_len": 2}, "logprob_start_len: .* from -1 to 1"),
    ({"text": "a", "return_logprob": True, "top_logprobs_num": 21}, "top_logprobs_num: .* from 0 to 20"),
    ({"text": "a", "return_logprob": True, "top_logprobs_num": True}, "top_logprobs_num: "),
    ({"text": "a", "return_logprob": True, "token_ids_logprob": [257]}, "token_ids_logprob: .* from 0 to 256"),
    (
        {"text": "a", "return_logprob": True, "token_ids_logprob": [[1], [2]]},
        "token_ids_logprob: .*each of the 1 prompts",
    ),
    ({"text": "a", "return_logprob": True, "token_ids_logprob": [0] * 1025}, "token_ids_logprob: .*at most 1024"),
    ({"text": "a", "return_logprob": True, "token_ids_logprob": [1, True]}, "token_ids_logprob: "),
    ({"text": "a", "return_sampling_mask": 1}, "return_sampling_mask: "),
    ({"text": "a", "return_sampling_mask": True, "sampling_logprobs_mode": "support"}, "one of selected"),
    ({"text": "a", "stream": "yes"}, "stream: "),
    ({"text": "a", "aux_info": 1}, "aux_info: "),
    ({"text": "a", "extra_config": 1}, "extra_config: must be a JSON object"),
    ({"text": "a", "extra_config": {"sp_edt": 1}}, "extra_config.sp_edt.*Did you mean sp_edit"),
    ({"text": "a", "extra_config": {"sp_advice_prompt": "\ud800"}}, "extra_config.sp_advice_prompt"),
    ({"text": "a", "generate_config": {"force_sp_accept": True}}, "force_sp_accept"),
    ({"text": "a", "extra_config": {"sp_advice_prompt": "b"}}, "sp_advice_prompt: needs speculative.algorithm=LOOKUP"),
]


@pytest.mark.parametrize(("params", "message"), BAD_PARAMETERS, ids=lambda value: str(value)[:40])
def test_a_bad_sampling_parameter_is_named(reader: CallReader, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reader.read({"text": "abc", "sampling_params": {"max_new_tokens": 4, **params}})


@pytest.mark.parametrize(("body", "message"), BAD_BODIES, ids=lambda value: str(value)[:40])
def test_a_bad_body_is_refused_by_field(reader: CallReader, body: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reader.read(body)


@pytest.mark.parametrize("name", sorted(UNSERVED_FIELDS))
def test_what_the_engine_lacks_is_refused_with_the_reason_and_taken_when_it_asks_for_nothing(
    reader: CallReader, name: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: is not served"):
        reader.read({"text": "a", "sampling_params": {"max_new_tokens": 4}, name: [True]})
    for nothing in (None, False, 0, [None]):
        assert reader.read({"text": "a", "sampling_params": {"max_new_tokens": 4}, name: nothing}).prompts


@pytest.mark.parametrize("name", sorted(UNSERVED_PARAMETERS))
def test_sampling_that_the_engine_lacks_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^sampling_params\.{name}: is not served"):
        read_sampling({name: 3}, LIMITS, 1)
    assert read_sampling({name: None}, LIMITS, 1) == read_sampling({}, LIMITS, 1)


@pytest.mark.parametrize("name", ["json_schema", "logit_bias", "stop", "stop_token_ids", "temperature", "unknown"])
def test_a_deeply_nested_parameter_is_refused_by_name(server: Served, name: str) -> None:
    """Case audit/01: as deep as the parser still reads, which left too little of the stack to say what is wrong."""
    for depth in (300, 900, 960, 980, 990):
        body = f'{{"text": "a", "sampling_params": {{"{name}": {"[" * depth}{"]" * depth}}}}}'
        response = requests.post(f"{server.url}/generate", data=body, timeout=60)
        assert response.status_code == 400
        assert re.search(f"sampling_params.{name}|nested so deeply", response.json()["error"]["message"])


def test_the_values_by_which_a_parameter_asks_for_nothing_are_taken() -> None:
    nothing = {"beam_width": 1, "spaces_between_special_tokens": False}
    assert read_sampling(nothing, LIMITS, 1) == read_sampling({}, LIMITS, 1)


def test_no_bound_on_new_tokens_means_what_the_context_holds() -> None:
    assert read_sampling({"max_new_tokens": None}, LIMITS, 14).params.max_new_tokens == 186


@pytest.fixture(scope="module")
def reader(config: Config) -> CallReader:
    return CallReader(LIMITS, Tokenizer.load(config.model.hf_checkpoint), server_seed=0, max_samples=4096)


def test_refusals_are_json_without_a_traceback(server: Served) -> None:
    status, answer = server.post("/generate", {"text": "a", "sampling_params": {"temprature": 1}})
    assert status == 400
    assert answer["error"]["code"] == 400
    assert "sampling_params.temprature" in answer["error"]["message"]
    assert "Traceback" not in str(answer)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 2000,
        b'{"text": "a", "sampling_params": {"temperature": NaN}}',
        b'{"text": "a", "sampling_params": {"temperature": -Infinity}}',
        b'{"text": "a", "rid": "\\ud800"}',
        b'{"text": "a", "sampling_params": {"n": ' + b"9" * 5000 + b"}}",
        '{"text": "a"}'.encode("utf-16"),
    ],
    ids=lambda body: repr(body[:50]),
)
def test_a_body_that_is_no_json_is_refused(server: Served, body: bytes) -> None:
    """Case audit/01 among them: numbers of thousands of digits, NaN, half of a surrogate pair."""
    response = requests.post(f"{server.url}/generate", data=body, timeout=60)
    assert response.status_code == 400
    assert "body: must be" in response.json()["error"]["message"]


def test_other_paths_and_methods_are_refused_in_json(server: Served) -> None:
    assert server.get("/nowhere")[0] == 404
    status, answer = server.get("/generate")
    assert status == 405
    assert "GET /generate" in answer["error"]["message"]


def test_a_body_beyond_the_bound_is_refused_and_the_server_goes_on(config: Config) -> None:
    with served(config, max_request_mb=1) as small:
        status, answer = small.post("/generate", {"text": "a" * 1_100_000})
        assert (status, answer["error"]["code"]) == (413, 413)
        assert small.generate(text="a", sampling_params={"max_new_tokens": 1})["output_ids"]


def test_a_large_batch_in_a_body_beyond_a_megabyte_is_still_read(server: Served) -> None:
    body = {
        "input_ids": [[65] * 4] * 3,
        "sampling_params": {"max_new_tokens": 1},
        "custom_labels": {"x": "y" * 1_200_000},
    }
    assert len(server.generate(**body)) == 3


def test_a_key_is_asked_for_except_by_probes(config: Config) -> None:
    with served(config, api_key="secret") as locked:
        assert locked.generate(text="a", sampling_params={"max_new_tokens": 1})["output_ids"]
        assert locked.get("/server_info")[0] == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            response = requests.post(f"{locked.url}/generate", json={"text": "a"}, headers=headers, timeout=60)
            assert response.status_code == 401
            assert "API key" in response.json()["error"]["message"]
            assert requests.get(f"{locked.url}/server_info", headers=headers, timeout=60).status_code == 401
        assert requests.get(f"{locked.url}/health", timeout=60).status_code == 200
        assert "secret" not in requests.get(f"{locked.url}/server_info", headers=locked.headers, timeout=60).text


EXTREMES: list[dict[str, Any]] = [
    {"temperature": 1e-7},
    {"temperature": 1e-5, "logit_bias": {"65": 1e30, "66": -1e30}},
    {"temperature": 1e30, "min_new_tokens": 2},
    {"temperature": 1e-300},
    {"top_k": 1 << 30},
    {"top_k": 10**30},
    {"top_p": 1e-300},
    {"min_p": 1.0, "top_p": 1e-30, "top_k": 1},
    {"stop_token_ids": [-1, 10**30, 257]},
    {"sampling_seed": -(2**63)},
    {"sampling_seed": 10**40},
    {"min_new_tokens": 20, "max_new_tokens": 20, "stop_token_ids": list(range(255))},
    {"stop_token_ids": list(range(257))},
    {"logit_bias": {str(token): 1e30 for token in range(257)}, "temperature": 2e-6},
    {"frequency_penalty": -2, "presence_penalty": -2, "repetition_penalty": 1e-9},
    {"stop": ["\N{REPLACEMENT CHARACTER}", "€" * 100]},
    {"n": 40, "max_new_tokens": 2},
]


@pytest.mark.parametrize("params", EXTREMES, ids=str)
def test_extreme_but_lawful_parameters_are_answered_and_leave_the_engine_alive(
    server: Served, params: dict[str, Any]
) -> None:
    """Case audit/01: the answers hold no NaN, which requests would read without a word."""
    body = {"text": "abcabc", "sampling_params": {"max_new_tokens": 20, **params}, "return_logprob": True}
    response = requests.post(f"{server.url}/generate", json=body, timeout=60)
    assert response.status_code == 200, response.text
    answer = parse_json(response.text, "answer", finite=True)
    for each in answer if isinstance(answer, list) else [answer]:
        assert all(logprob <= 0.0 for logprob, _, _ in each["meta_info"]["output_token_logprobs"])
        assert len(each["meta_info"]["output_token_logprobs"]) == len(each["output_ids"]) > 0
    assert server.get("/health")[0] == 200
