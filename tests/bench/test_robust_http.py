"""The fuzzer of HTTP requests: the same request for the same seed, and no fault of an answer goes by."""

from http.client import HTTPResponse
from io import BytesIO
from pathlib import Path
from random import Random

import pytest

from slime_spec.bench.robustness.fuzzer import NanAnswer
from slime_spec.bench.robustness.http import ServerFault, read_answer
from slime_spec.bench.robustness.http_bodies import make_exchange, make_policy


class Sent:
    """A socket from which an answer is read."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    def makefile(self, mode: str) -> BytesIO:
        return BytesIO(self._answer)


def answered(status: str, body: str, *headers: str) -> object:
    lines = [f"HTTP/1.1 {status}", "Connection: close", *headers]
    response = HTTPResponse(Sent("\r\n".join(lines).encode() + b"\r\n\r\n" + body.encode()))  # type: ignore[arg-type]
    response.begin()
    return read_answer(response)


JSON, STREAM = "Content-Type: application/json", "Content-Type: text/event-stream"


def test_a_fault_of_an_answer_is_found() -> None:
    assert answered("200 OK", '{"a": 1}', JSON) == {"a": 1}
    assert answered("503 Unavailable", "{}", JSON, "Retry-After: 1") == {}
    assert answered("200 OK", 'data: {"a": 1}\n\ndata: [DONE]\n\n', STREAM) == [{"a": 1}]
    for status in ("500 Internal Server Error", "503 Unavailable", "504 Timeout"):
        with pytest.raises(ServerFault, match=status[:3]):
            answered(status, "{}", JSON)
    with pytest.raises(ServerFault, match="a stream ended"):
        answered("200 OK", 'data: {"a": 1}\n\n', STREAM)
    with pytest.raises(ServerFault, match="a stream says"):
        answered("200 OK", 'data: {"error": {"code": 500}}\n\ndata: [DONE]\n\n', STREAM)
    with pytest.raises(NanAnswer, match="NaN"):
        answered("200 OK", "[NaN]", JSON)
    with pytest.raises(NanAnswer, match="Infinity"):
        answered("200 OK", "data: [-Infinity]\n\ndata: [DONE]\n\n", STREAM)


def test_a_seed_makes_the_same_request_again_and_others_make_others(tmp_path: Path) -> None:
    policy = make_policy(tmp_path / "policy")
    first, again = ([make_exchange(Random(seed), policy) for seed in range(200)] for _ in range(2))
    assert first == again
    assert len({each.body for each in first}) > 150
    assert {each.path for each in first} >= {"/generate", "/update_weights_from_tensor", "/v1/completions"}
