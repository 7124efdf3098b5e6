"""A client as people write them for SGLang, kept word for word, against this server."""

from __future__ import annotations

import base64
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.support.http_server import Served


class SGLangClient:
    """The calls of an RL framework's SGLang client: nothing in it knows of this project."""

    def __init__(self, base: str) -> None:
        self.base = base

    def wait_until_healthy(self, timeout_s: float = 60.0) -> None:
        deadline = time.time() + timeout_s
        while time.time() < deadline:
            try:
                if requests.get(f"{self.base}/health_generate", timeout=5).status_code == 200:
                    break
            except requests.ConnectionError:
                pass
            time.sleep(0.2)
        while requests.get(f"{self.base}/flush_cache", timeout=5).status_code != 200:
            time.sleep(0.2)

    def post(self, endpoint: str, payload: dict[str, Any] | None = None) -> Any:
        response = requests.post(f"{self.base}/{endpoint}", json=payload or {}, timeout=60)
        response.raise_for_status()
        return response.json() if response.text else None

    def generate_one(self, input_ids: list[int], sampling_params: dict[str, Any]) -> tuple[list[int], list[float], str]:
        output = self.post(
            "generate", {"input_ids": input_ids, "sampling_params": sampling_params, "return_logprob": True}
        )
        meta = output["meta_info"]
        tokens = [item[1] for item in meta["output_token_logprobs"]]
        logprobs = [item[0] for item in meta["output_token_logprobs"]]
        assert len(tokens) == meta["completion_tokens"]
        assert meta["finish_reason"]["type"] in ("stop", "length", "abort")
        return tokens, logprobs, meta["weight_version"]

    def stream_text(self, text: str, sampling_params: dict[str, Any]) -> str:
        response = requests.post(
            f"{self.base}/generate",
            json={"text": text, "sampling_params": sampling_params, "stream": True},
            stream=True,
            timeout=60,
        )
        shown = ""
        for chunk in response.iter_lines(decode_unicode=False):
            line = chunk.decode("utf-8")
            if line and line.startswith("data:"):
                if line == "data: [DONE]":
                    break
                data = json.loads(line[5:].strip("\n"))
                shown += data["text"][len(shown) :]
        return shown

    def acceptance(self) -> float:
        info = requests.get(f"{self.base}/get_server_info", timeout=60).json()
        return info["internal_states"][0]["avg_spec_accept_length"]

    def update_from_disk(self, path: str, version: str) -> None:
        self.post("pause_generation", {"mode": "retract"})
        answer = self.post("update_weights_from_disk", {"model_path": path, "weight_version": version})
        assert answer["success"]
        self.post("continue_generation")

    def abort_all(self) -> None:
        self.post("abort_request", {"abort_all": True})

    def sleep(self) -> None:
        requests.get(f"{self.base}/flush_cache", timeout=60)
        self.post("release_memory_occupation")

    def wake(self) -> None:
        self.post("resume_memory_occupation", {"tags": ["weights"]})
        self.post("resume_memory_occupation", {"tags": ["kv_cache", "cuda_graph"]})


@pytest.fixture
def client(own_server: Served) -> SGLangClient:
    return SGLangClient(own_server.url)


def test_a_client_written_for_sglang_runs_a_rollout_loop(client: SGLangClient, policy: Path) -> None:
    client.wait_until_healthy()
    params = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "max_new_tokens": 32,
        "stop": None,
        "stop_token_ids": None,
        "skip_special_tokens": False,
        "no_stop_trim": True,
        "spaces_between_special_tokens": False,
        "sampling_seed": 1234,
    }
    tokens, logprobs, version = client.generate_one([97, 98, 99, 97, 98, 99], params)
    assert len(tokens) == len(logprobs) <= 32
    assert max(logprobs) <= 0
    assert version == "default"
    assert client.generate_one([97, 98, 99, 97, 98, 99], params)[0] == tokens
    greedy = {"temperature": 0, "max_new_tokens": 20}
    assert (
        client.stream_text("abc", greedy) == client.post("generate", {"text": "abc", "sampling_params": greedy})["text"]
    )
    assert client.acceptance() >= 1.0
    client.update_from_disk(str(policy), "step-1")
    assert client.generate_one([97, 98], params)[2] == "step-1"
    client.sleep()
    client.wake()
    assert client.generate_one([97, 98, 99, 97, 98, 99], params)[0] == tokens


def num_requests_of(load: Any) -> int:
    """As slime reads a load: the first count that any level has."""
    if isinstance(load, list):
        return sum(map(num_requests_of, load))
    if "loads" in load:
        return num_requests_of(load["loads"])
    return next(load[name] for name in ("num_reqs", "num_total_reqs", "total_reqs") if name in load)


def test_slimes_client_fills_a_sample_over_two_turns_and_replays_top_p(client: SGLangClient, policy: Path) -> None:
    """The bodies of slime 624b824a8 at top_p 0.9; what it checks of an answer raises there, and ends its run."""
    custom = {"return_top_p_token_ids": True}
    params = {"temperature": 1.0, "top_p": 0.9, "top_k": -1, "max_new_tokens": 20, "stop": None, "stop_token_ids": None}
    params |= {"skip_special_tokens": False, "no_stop_trim": True, "spaces_between_special_tokens": False}
    prompt, response, kept, offsets = list(b"abcabc"), [], [], [0]
    for _ in range(2):
        body = {"sampling_params": {**params, "custom_params": custom}, "return_logprob": True}
        answer = client.post("generate", {**body, "input_ids": prompt + response})
        info = answer["meta_info"]
        assert info["finish_reason"]["type"] in ("stop", "length")
        response += [token_id for _, token_id, _ in info["output_token_logprobs"]]
        arrays = (base64.b64decode(info[name]) for name in ("top_p_token_ids", "top_p_token_offsets"))
        token_ids, ends = (list(memoryview(each).cast("i")) for each in arrays)
        assert (ends[0], ends[-1]) == (0, len(token_ids))
        offsets += [offsets[-1] + end for end in ends[1:]]
        kept += token_ids
    assert len(offsets) == len(response) + 1
    assert offsets[-1] == len(kept)
    for place, token in enumerate(response):
        assert token in kept[offsets[place] : offsets[place + 1]]
    client.post("update_weights_from_disk", {"model_path": str(policy), "weight_version": "3"})
    assert requests.get(f"{client.base}/get_weight_version", timeout=60).json() == {"weight_version": "3"}
    client.sleep()
    client.post("resume_memory_occupation", {"tags": None})
    assert client.generate_one(prompt, {"max_new_tokens": 1})[2] == "3"


def test_slimes_abort_finds_the_server_idle(client: SGLangClient) -> None:
    client.abort_all()
    loads = requests.get(f"{client.base}/v1/loads?include=core", timeout=60).json()
    older = requests.get(f"{client.base}/get_load", timeout=60).json()
    assert num_requests_of(loads) == num_requests_of(older) == 0
    assert "speculative" not in loads["loads"][0]
    assert loads["aggregate"]["total_reqs"] == 0
    for query in ("include=everything", "dp_rank=1"):
        refused = requests.get(f"{client.base}/v1/loads?{query}", timeout=60)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, query.partition("=")[0])


def test_a_partial_rollout_gets_its_aborted_samples_back(client: SGLangClient) -> None:
    results: list[dict[str, Any]] = []
    params = {"temperature": 1.0, "max_new_tokens": 20_000, "ignore_eos": True}

    def rollout(index: int) -> None:
        results.append(client.post("generate", {"text": f"prompt {index}", "sampling_params": params}))

    threads = [threading.Thread(target=rollout, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    while requests.get(f"{client.base}/server_info", timeout=60).json()["internal_states"][0]["num_running_reqs"] < 4:
        time.sleep(0.01)
    client.abort_all()
    for thread in threads:
        thread.join(60)
    assert len(results) == 4
    assert {result["meta_info"]["finish_reason"]["type"] for result in results} == {"abort"}
    assert all(len(result["output_ids"]) == result["meta_info"]["completion_tokens"] for result in results)
