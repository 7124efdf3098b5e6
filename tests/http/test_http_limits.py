"""What one client asks for, sends or leaves unread costs the others neither a worker nor unbounded memory."""

import asyncio
import gzip
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from aiohttp import web

from rollout.embedded.http.calls import CallReader
from rollout.embedded.http.clients import Clients
from rollout.embedded.http.server import ServerOptions
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.preflight.requests import RequestLimits
from slime_spec.types import GroupRequest, SamplingParams
from tests.support.embedded_harness import make_core
from tests.support.http_server import TIMEOUT_S, Served, served

LONG = {"max_new_tokens": 30_000, "temperature": 0, "ignore_eos": True}
PATIENCE_S = 0.4
QUEUE = 8


@pytest.fixture(scope="module")
def strict(config: Config) -> Iterator[Served]:
    """A server with a short queue, a small bound of bodies and little patience."""
    options = {"max_queued_requests": QUEUE, "client_timeout_s": PATIENCE_S, "max_request_mb": 1}
    with served(config, **options) as running:
        yield running


def connected(server: Served) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=TIMEOUT_S)


def everything(client: socket.socket) -> bytes:
    """What the server sends until it closes the connection."""
    parts = []
    try:
        while part := client.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:  # closed while something of ours was unread
        pass
    return b"".join(parts)


def test_a_full_queue_is_503_with_a_time_to_retry_and_empties(strict: Served) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(strict.generate, text="abc", rid="long", sampling_params={**LONG, "n": QUEUE - 1})
        strict.wait_for(lambda state: state["num_running_reqs"] > 0)
        more = {"input_ids": [[1], [2]], "sampling_params": {"max_new_tokens": 1}}
        response = requests.post(f"{strict.url}/generate", json=more, timeout=TIMEOUT_S)
        assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
        assert "queue is full: 7 of 8" in response.json()["error"]["message"]
        assert strict.post("/generate", {**more, "stream": True})[0] == 503
        strict.post("/abort_request", {"rid": "long"})
        assert len(running.result(TIMEOUT_S)) == QUEUE - 1
    assert len(strict.generate(**more)) == 2


@pytest.mark.parametrize(
    "body",
    [
        {"input_ids": [[1]] * 3, "sampling_params": {"n": 3, "max_new_tokens": 1}},
        {"text": ["a"] * 9, "sampling_params": {"max_new_tokens": 1}},
        {"text": "a", "sampling_params": {"n": 2**53, "max_new_tokens": 1}},
        {"text": "a" * 900_000, "sampling_params": {"max_new_tokens": 1}},
    ],
    ids=lambda body: str(body)[:60],
)
def test_a_call_that_can_never_have_room_is_refused(strict: Served, body: dict[str, object]) -> None:
    """Case audit/03: a body of 168 bytes made 81,920 seeds and six seconds of work before anything was refused."""
    status, answer = strict.post("/generate", body)
    assert status == 400
    assert "at most" in answer["error"]["message"]


def test_the_queue_is_as_long_as_the_engine_decodes_many_unless_it_is_set() -> None:
    assert ServerOptions().max_samples(max_running_requests=64) == 4096
    assert ServerOptions().max_samples(max_running_requests=1) == 1024
    assert ServerOptions(max_queued_requests=5).max_samples(max_running_requests=64) == 5


class CountedRequest(GroupRequest):
    """Counts how often its sample indices, a tuple of all of them, are made."""

    made = 0

    @property
    def sample_indices(self) -> tuple[int, ...]:
        type(self).made += 1
        return super().sample_indices


def test_a_sample_that_waits_costs_the_same_in_a_large_group_and_holds_no_prompt_of_its_own(config: Config) -> None:
    """Case audit/03: queueing was quadratic in the samples of a group."""
    core = make_core(config)
    group = core.add(CountedRequest("g", (1,) * 500, tuple(range(300)), SamplingParams()), lambda sample: None)
    assert CountedRequest.made <= 2
    assert [each.sample_index for each in core.waiting] == list(range(300))
    assert {id(each.token_ids) for each in core.waiting} == {id(group.prompt)}
    core.step()
    running = core.batch.sequences
    assert len({id(each.token_ids) for each in running} | {id(group.prompt)}) == len(running) + 1
    assert group.prompt == [1] * 500


def test_what_stands_for_all_prompts_is_read_once(config: Config) -> None:
    limits = RequestLimits(vocab_size=257, context_length=200, algorithm="LOOKUP", max_total_tokens=1000)
    reader = CallReader(limits, Tokenizer.load(config.model.hf_checkpoint), 0, max_samples=100)
    params = {"stop_token_ids": list(range(200)) * 2, "max_new_tokens": 2}
    call = reader.read({"input_ids": [[1]] * 50, "sampling_params": params, "extra_config": {"sp_edit": 1}})
    assert len({id(prompt.sampling) for prompt in call.prompts}) == 1
    assert call.prompts[0].sampling.params.stop_token_ids == tuple(range(200))
    unbounded = {"sampling_params": {"max_new_tokens": None}, "input_ids": [[1], [1, 2], [1]]}
    assert [each.sampling.params.max_new_tokens for each in reader.read(unbounded).prompts] == [199, 198, 199]
    with pytest.raises(ConfigError, match="prompts times samples must be at most 100"):
        reader.read({"input_ids": [[1]] * 101, "sampling_params": {"max_new_tokens": 1}})


def test_a_body_that_does_not_come_is_given_up(strict: Served) -> None:
    with connected(strict) as slow:
        slow.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        assert everything(slow).startswith(b"HTTP/1.1 408 ")
    assert strict.get("/health")[0] == 200


@pytest.mark.parametrize("sent", [b"", b"POST /gen", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /hea"])
def test_a_silent_connection_is_closed(strict: Served, sent: bytes) -> None:
    with connected(strict) as silent:
        silent.sendall(sent)
        assert everything(silent).count(b"200 OK") == sent.count(b"\r\n\r\n")


def test_a_stream_that_nobody_reads_is_cut_off_and_its_generation_aborted(strict: Served) -> None:
    body = json.dumps({"text": "abc", "stream": True, "return_logprob": True, "sampling_params": LONG}).encode()
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = strict.url.removeprefix("http://").split(":")
        deaf.connect((host, int(port)))
        deaf.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        strict.wait_for(lambda state: state["num_running_reqs"] > 0)
        strict.wait_for(lambda state: state["num_running_reqs"] == 0)
        deaf.settimeout(TIMEOUT_S)
        assert b"[DONE]" not in everything(deaf)


def test_a_whole_answer_that_nobody_reads_is_cut_off() -> None:
    async def scenario() -> None:
        clients = Clients(10**6, PATIENCE_S, slowest_bytes_per_s=1e9)
        app = web.Application(middlewares=[clients.watched])

        async def large(request: web.Request) -> web.Response:
            return web.Response(body=bytes(50_000_000))

        app.router.add_get("/", large)
        runner = web.AppRunner(app)
        await runner.setup()
        server = runner.server
        assert server is not None
        listener = await asyncio.get_running_loop().create_server(lambda: clients.connection(server), "127.0.0.1", 0)
        client = socket.create_connection(listener.sockets[0].getsockname())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        deadline_s = time.monotonic() + TIMEOUT_S
        while not server.requests_count or server.connections:
            assert time.monotonic() < deadline_s, "the connection is still held"
            await asyncio.sleep(0.02)
        client.close()
        listener.close()
        await runner.cleanup()

    asyncio.run(scenario())


def head(*lines: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join((b"POST /generate HTTP/1.1", b"Host: x", b"Connection: close", *lines)) + b"\r\n\r\n" + body


ASK = b'{"text": "a", "sampling_params": {"max_new_tokens": 1}}'
LENGTH = b"Content-Length: %d" % len(ASK)
CHUNKED = b"Transfer-Encoding: chunked"
RAW: dict[str, tuple[bytes, int]] = {
    "a chunked body": (head(CHUNKED, body=b"%x\r\n%s\r\n0\r\n\r\n" % (len(ASK), ASK)), 200),
    "a chunk of no length": (head(CHUNKED, body=b"zz\r\n" + ASK), 400),
    "a negative length": (head(b"Content-Length: -1", body=ASK), 400),
    "a length in words": (head(b"Content-Length: ten", body=ASK), 400),
    "two lengths": (head(LENGTH, b"Content-Length: 3", body=ASK), 400),
    "length and chunks": (head(LENGTH, CHUNKED, body=b"0\r\n\r\n"), 400),
    "a length beyond the bound": (head(b"Content-Length: 99999999999", body=ASK), 413),
    "a length beyond what comes": (head(b"Content-Length: 500", body=ASK), 408),
    "gzip that is none": (head(LENGTH, b"Content-Encoding: gzip", body=ASK), 400),
    "deflate that is none": (head(b"Content-Length: 4", b"Content-Encoding: deflate", body=b"\xff" * 4), 400),
    "an unknown encoding": (head(LENGTH, b"Content-Encoding: rot13", body=ASK), 200),
    "a header of 9 KB": (head(LENGTH, b"X: " + b"a" * 9000, body=ASK), 400),
    "a path of 9 KB": (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", 400),
    "a thousand headers": (head(LENGTH, *[b"X%d: a" % index for index in range(1000)], body=ASK), 400),
    "a header with a NUL": (head(LENGTH, b"X: a\0b", body=ASK), 400),
    "an odd method": (b"PROPFIND /generate HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405),
    "a method of nobody": (b"BREW /generate HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 400),
    "HTTP/2, as a gRPC client begins": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", 400),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    "a path that is an asterisk": (b"GET * HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a path of bytes": (b"GET /%ff%fe%00 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
    "an expectation": (head(LENGTH, b"Expect: a miracle", body=ASK), 417),
    "an upgrade": (head(LENGTH, b"Upgrade: websocket", b"Connection: Upgrade", body=ASK), 200),
}


@pytest.mark.parametrize("how", RAW)
def test_bytes_that_are_no_lawful_request_are_answered_below_500(
    strict: Served, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Cases audit/01 and audit/02: and nothing of it is an error in the server's log."""
    sent, status = RAW[how]
    with connected(strict) as client:
        client.sendall(sent)
        answer = everything(client)
    assert int(answer.split(b" ", 2)[1]) == status, answer[:300]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_small_body_that_grows_beyond_the_bound_is_refused(strict: Served) -> None:
    bomb = gzip.compress(b'{"text": "' + b"a" * 50_000_000 + b'"}')
    assert len(bomb) < 100_000
    headers = {"Content-Encoding": "gzip"}
    response = requests.post(f"{strict.url}/generate", data=bomb, headers=headers, timeout=TIMEOUT_S)
    assert response.status_code == 413


def test_an_authorisation_of_bytes_is_no_key(config: Config) -> None:
    """Case audit/02: it ended in a 500."""
    with served(config, api_key="sécret") as locked:
        for key, status in ((b"\xff\xfe", 401), (b"s\xe9cret", 401), ("sécret".encode(), 200)):
            with connected(locked) as client:
                client.sendall(head(LENGTH, b"Authorization: Bearer " + key, body=ASK))
                assert int(everything(client).split(b" ", 2)[1]) == status
