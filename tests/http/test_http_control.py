"""Steering: abort, pause and continue, flush, release and resume, disconnects, shutdown, health."""

import json
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from urllib.parse import urlparse

import pytest

from slime_spec.config.tree import Config
from tests.support.http_server import Served, served

LONG = {"max_new_tokens": 30_000, "temperature": 0, "ignore_eos": True}
SHORT = {"max_new_tokens": 20, "temperature": 0, "ignore_eos": True}


def started(server: Served, pool: ThreadPoolExecutor, **body: Any) -> Future[Any]:
    """A long request that the engine is working on."""
    answer = pool.submit(server.generate, **{"text": "abc", "sampling_params": LONG, **body})
    server.wait_for(lambda state: state["num_running_reqs"] > 0)
    return answer


def is_idle(state: dict[str, Any]) -> bool:
    return state["num_running_reqs"] == 0 and state["num_queue_reqs"] == 0


@pytest.mark.parametrize("how", [{"rid": "long"}, {"abort_all": True}])
def test_an_aborted_request_is_answered_with_what_it_has(server: Served, how: dict[str, Any]) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = started(server, pool, rid="long")
        assert server.post("/abort_request", {"rid": "other"})[0] == 200
        assert not answer.done()
        assert server.post("/abort_request", how)[0] == 200
        aborted = answer.result(60)
    info = aborted["meta_info"]
    assert info["finish_reason"]["type"] == "abort"
    assert 0 < info["completion_tokens"] == len(aborted["output_ids"]) < 30_000
    whole = server.generate(text="abc", sampling_params={**SHORT, "max_new_tokens": 5})["output_ids"]
    assert aborted["output_ids"][:5] == whole[: len(aborted["output_ids"])]
    server.wait_for(is_idle)


def test_one_prompt_of_a_batch_can_be_aborted(server: Served) -> None:
    with ThreadPoolExecutor(1) as pool:
        batch = started(server, pool, text=["abc", "def"], sampling_params=[LONG, SHORT], rid="b")
        server.wait_for(lambda state: state["num_running_reqs"] == 1)
        server.post("/abort_request", {"rid": "b_0"})
        answers = batch.result(60)
        single = started(server, pool, text=["abc"], rid="s")
        server.post("/abort_request", {"rid": "s_0"})
        answers += single.result(60)
    assert [answer["meta_info"]["finish_reason"]["type"] for answer in answers] == ["abort", "length", "abort"]


def test_an_id_in_use_is_refused_and_free_again_afterwards(server: Served) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = started(server, pool, rid="twice")
        status, refused = server.post("/generate", {"text": "a", "rid": "twice", "sampling_params": SHORT})
        assert status == 400
        assert "under way" in refused["error"]["message"]
        server.post("/abort_request", {"rid": "twice"})
        answer.result(60)
    assert server.generate(text="a", rid="twice", sampling_params=SHORT)["output_ids"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_its_request(server: Served, stream: bool) -> None:
    address = urlparse(server.url)
    body = json.dumps({"text": "abc", "sampling_params": LONG, "stream": stream}).encode()
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        server.wait_for(lambda state: state["num_running_reqs"] > 0)
        if stream:
            assert b"200 OK" in connection.recv(4096)
    server.wait_for(is_idle)


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_pause_stops_tokens_and_continuing_completes_the_same_response(own_server: Served, mode: str) -> None:
    params = {**LONG, "max_new_tokens": 1500}
    with ThreadPoolExecutor(2) as pool:
        answer = started(own_server, pool, sampling_params=params)
        status, paused = own_server.post("/pause_generation", {"mode": mode})
        assert (status, paused["status"]) == (200, "ok")
        waiting = pool.submit(own_server.generate, text="abc", sampling_params=SHORT)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        assert not answer.done()
        assert own_server.get("/health")[0] == own_server.get("/health_generate")[0] == 200
        assert own_server.post("/continue_generation", {})[0] == 200
        assert answer.result(60)["meta_info"]["completion_tokens"] == 1500
        assert waiting.result(60)["output_ids"] == answer.result()["output_ids"][:20]


def test_a_pause_that_aborts_answers_everyone_and_keeps_new_requests_waiting(own_server: Served) -> None:
    with ThreadPoolExecutor(2) as pool:
        answer = started(own_server, pool)
        assert own_server.post("/pause_generation")[0] == 200  # abort is SGLang's default mode
        assert answer.result(60)["meta_info"]["finish_reason"]["type"] == "abort"
        waiting = pool.submit(own_server.generate, text="abc", sampling_params=SHORT)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        own_server.post("/continue_generation")
        assert len(waiting.result(60)["output_ids"]) == 20


def test_an_unknown_pause_mode_is_refused(server: Served) -> None:
    status, refused = server.post("/pause_generation", {"mode": "soft"})
    assert status == 400
    assert "abort, retract, in_place" in refused["error"]["message"]


def test_flushing_tells_whether_the_server_is_idle(server: Served) -> None:
    server.wait_for(is_idle)
    assert server.get("/flush_cache") == (200, "Cache flushed.\n")
    with ThreadPoolExecutor(1) as pool:
        answer = started(server, pool)
        status, text = server.post("/flush_cache")
        assert status == 400
        assert "running" in text
        server.post("/abort_request", {"abort_all": True})
        answer.result(60)


def test_memory_goes_with_the_first_tag_and_comes_back_with_the_last(own_server: Served) -> None:
    before = own_server.generate(text="abc", sampling_params=SHORT)["output_ids"]
    assert own_server.post("/release_memory_occupation", {"tags": ["kv_cache"]})[0] == 200
    assert own_server.post("/release_memory_occupation", {"tags": ["weights"]})[0] == 200
    assert own_server.state()["memory_released"]
    status, refused = own_server.post("/generate", {"text": "abc", "sampling_params": SHORT})
    assert status == 503
    assert "offloaded" in refused["error"]["message"]
    assert own_server.get("/health")[0] == own_server.get("/health_generate")[0] == 200
    assert own_server.post("/resume_memory_occupation", {"tags": ["weights"]})[0] == 200
    assert own_server.state()["memory_released"]
    status, refused = own_server.post("/resume_memory_occupation", {"tags": ["weights"]})
    assert (status, refused["error"]["message"]) == (400, "not released: weights")
    assert own_server.post("/resume_memory_occupation", {"tags": ["kv_cache"]})[0] == 200
    assert not own_server.state()["memory_released"]
    assert own_server.generate(text="abc", sampling_params=SHORT)["output_ids"] == before
    assert own_server.post("/release_memory_occupation")[0] == own_server.get("/resume_memory_occupation")[0] == 200
    assert own_server.post("/release_memory_occupation", {"tags": ["disk"]})[0] == 400


def test_memory_in_use_is_not_released(own_server: Served) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = started(own_server, pool)
        status, refused = own_server.post("/release_memory_occupation")
        assert status == 400
        assert "requests are running" in refused["error"]["message"]
        own_server.post("/abort_request", {"abort_all": True})
        answer.result(60)
    assert own_server.generate(text="abc", sampling_params=SHORT)["output_ids"]


def test_health_says_when_the_engine_has_ended(config: Config) -> None:
    with served(config) as running:
        assert running.get("/health") == running.get("/health_generate") == (200, "")
        running.engine.stop()
        assert running.get("/health")[0] == running.get("/health_generate")[0] == 503
        status, refused = running.post("/generate", {"text": "a"})
        assert status == 503
        assert "engine" in refused["error"]["message"]


def test_a_server_that_stops_answers_what_is_under_way(config: Config) -> None:
    with ThreadPoolExecutor(1) as pool:
        with served(config) as running:
            answer = started(running, pool)
        aborted = answer.result(60)
    assert aborted["meta_info"]["finish_reason"]["type"] == "abort"
    assert aborted["output_ids"]
