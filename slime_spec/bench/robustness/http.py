"""Hostile HTTP requests go to a server of a tiny model in this process, over all its endpoints."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from queue import Queue
from random import Random
from typing import Any

from rollout.embedded.http.server import EngineServer, ServerOptions
from slime_spec.algorithms import LOOKUP
from slime_spec.bench.robustness.fuzzer import Case, Kind, finite_json
from slime_spec.bench.robustness.http_bodies import Exchange, make_exchange, make_policy
from slime_spec.config.speculative import SpeculativeConfig
from slime_spec.config.tree import Config, EngineConfig, ModelConfig

TIMEOUT_S = 15.0
CHECK_EVERY = 40  # requests between two looks at the server's greedy answer
GREEDY = {"text": "abcabcabc", "sampling_params": {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}}


class ServerFault(Exception):
    """The server answered with an error of its own, or not as before."""


class HttpRequests:
    """Fuzzes the HTTP server, which must answer rightly all the while; what a request changed is undone after it."""

    def __init__(self, folder: Path) -> None:
        self._policy = make_policy(folder / "policy")
        config = Config(
            model=ModelConfig(hf_checkpoint=str(self._policy)),
            speculative=SpeculativeConfig(algorithm=LOOKUP.name, num_draft_tokens=4),
            engine=EngineConfig(max_running_requests=16),
        )
        options = ServerOptions(port=0, max_request_mb=2, max_queued_requests=64, client_timeout_s=5.0)
        self._server = EngineServer(config, options)
        self._address, self._stop = _serving(self._server)
        self._count = 0
        self._expected = self._greedy()

    def make(self, random: Random) -> Case[Exchange]:
        exchange = make_exchange(random, self._policy)
        what = f"{exchange.method} {exchange.path} {exchange.headers} {exchange.body[:300]!r}"
        return Case(what[:600], exchange)

    def attempt(self, case: Case[Exchange]) -> bool:
        exchange = case.value
        self._count += 1
        for path, body in exchange.before:
            self._post(path, body)
        status = self._send(exchange.method, exchange.path, exchange.headers, exchange.body)
        if exchange.changes_state:
            for path, body in (
                ("/end_weight_update", {}),
                ("/continue_generation", {}),
                ("/resume_memory_occupation", {}),
                ("/update_weights_from_disk", {"model_path": str(self._policy), "weight_version": "default"}),
            ):
                self._post(path, body)
        if exchange.changes_state or self._count % CHECK_EVERY == 0:
            found = self._greedy()
            if found != self._expected:
                raise ServerFault(f"the greedy answer was {self._expected} and is {found}")
        return status == 200

    def close(self) -> None:
        self._stop()

    def _greedy(self) -> list[int]:
        answer = self._post("/generate", GREEDY)
        tokens: list[int] = answer["output_ids"]
        return tokens

    def _post(self, path: str, body: object) -> Any:
        connection = HTTPConnection(*self._address, timeout=TIMEOUT_S)
        try:
            connection.request("POST", path, json.dumps(body))
            return read_answer(connection.getresponse())
        finally:
            connection.close()

    def _send(self, method: str, path: str, headers: tuple[tuple[str, str], ...], body: bytes) -> int:
        """Send what http.client would not: its checks of methods, paths and headers are passed by."""
        connection = HTTPConnection(*self._address, timeout=TIMEOUT_S)
        lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", *(f"{k}: {v}" for k, v in headers)]
        if not any(name.lower() in ("content-length", "transfer-encoding") for name, _ in headers):
            lines.append(f"Content-Length: {len(body)}")
        try:
            connection.connect()
            with suppress(ConnectionError):  # refused before all of it had come: the answer says why
                connection.sock.sendall("\r\n".join(lines).encode(errors="surrogateescape") + b"\r\n\r\n" + body)
            response = HTTPResponse(connection.sock, method=method)
            response.begin()
            if method != "HEAD":  # whose answers have no body
                read_answer(response)
            return response.status
        finally:
            connection.close()


def read_answer(response: HTTPResponse) -> Any:
    """Return the value of an answer; raises ServerFault for a status of 500 or above without a time to try again."""
    text = response.read().decode()
    if response.status >= 500 and not (response.status == 503 and response.headers["Retry-After"]):
        raise ServerFault(f"status {response.status}: {text[:300]}")
    kind = response.headers.get("Content-Type", "")
    if kind.startswith("text/event-stream"):
        *events, last, _ = text.split("\n\n")
        if last != "data: [DONE]":
            raise ServerFault(f"a stream ended with {last[:100]!r}")
        values = [finite_json(event.removeprefix("data: ")) for event in events]
        for value in values:
            assert isinstance(value, dict), "a chunk is an object"
            if value.get("error", {}).get("code", 0) == 500:
                raise ServerFault(f"a stream says {value}")
        return values
    return finite_json(text) if kind.startswith("application/json") else text


def _serving(server: EngineServer) -> tuple[tuple[str, int], Callable[[], None]]:
    """Serve on a thread; returns the address, and what stops the server."""
    ready: Queue[tuple[str, asyncio.AbstractEventLoop, asyncio.Event] | BaseException] = Queue()

    async def serve() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        await server.serve(lambda address: ready.put((address, loop, stop)), stop)

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:  # noqa: BLE001 - raised again by the fuzzer's own thread, which waits for it
            ready.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    answer = ready.get(timeout=TIMEOUT_S)
    if isinstance(answer, BaseException):
        raise answer
    address, loop, stop = answer
    host, _, port = address.removeprefix("http://").rpartition(":")

    def end() -> None:
        loop.call_soon_threadsafe(stop.set)
        thread.join(TIMEOUT_S)

    return (host, int(port)), end


measure = Kind("http", "HTTP requests to a server of a tiny model", 10_000, HttpRequests).measure
