"""A running server of one embedded engine, in a thread of the test's process, on a free port of loopback."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Queue
from typing import Any

import requests

from rollout.embedded.http.server import EngineServer, ServerOptions
from slime_spec.config.tree import Config

TIMEOUT_S = 60.0


class Served:
    """A client's view of the server: JSON in, (status, JSON) out."""

    def __init__(self, url: str, engine: Any, api_key: str | None = None) -> None:
        self.url, self.engine = url, engine
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def post(self, path: str, body: object = None) -> tuple[int, Any]:
        return self._read(requests.post(self.url + path, json=body, headers=self.headers, timeout=TIMEOUT_S))

    def get(self, path: str) -> tuple[int, Any]:
        return self._read(requests.get(self.url + path, headers=self.headers, timeout=TIMEOUT_S))

    def generate(self, **body: Any) -> Any:
        status, answer = self.post("/generate", body)
        assert status == 200, answer
        return answer

    def stream(self, **body: Any) -> list[dict[str, Any]]:
        """Every chunk of a streamed call; checks the framing."""
        response = requests.post(
            f"{self.url}/generate", json={**body, "stream": True}, headers=self.headers, timeout=TIMEOUT_S
        )
        assert response.status_code == 200, response.text
        assert response.headers["Content-Type"].startswith("text/event-stream")
        *chunks, last, rest = response.content.decode().split("\n\n")
        assert (last, rest) == ("data: [DONE]", "")
        assert all(chunk.startswith("data: ") for chunk in chunks)
        return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]

    def state(self) -> dict[str, Any]:
        return self.get("/server_info")[1]["internal_states"][0]

    def wait_for(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Poll the server's state until something holds of it."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while not holds(state := self.state()):
            assert time.monotonic() < deadline_s, state
            time.sleep(0.01)
        return state

    @staticmethod
    def _read(response: requests.Response) -> tuple[int, Any]:
        is_json = response.headers.get("Content-Type", "").startswith("application/json")
        return response.status_code, response.json() if is_json else response.text


@contextmanager
def served(config: Config, **options: Any) -> Iterator[Served]:
    """Serve until the block ends, and see the server end in order."""
    server = EngineServer(config, ServerOptions(port=0, **options))
    addresses: Queue[str | BaseException] = Queue()
    stops: Queue[Callable[[], Any]] = Queue()

    async def serve() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        stops.put(lambda: loop.call_soon_threadsafe(stop.set))
        await server.serve(addresses.put, stop)

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:  # noqa: BLE001 - handed to the test that waits for the address
            addresses.put(error)

    thread = threading.Thread(target=run)
    thread.start()
    address = addresses.get(timeout=TIMEOUT_S)
    if isinstance(address, BaseException):
        raise address
    try:
        yield Served(address, server._engine, options.get("api_key"))
    finally:
        stops.get()()
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), "the server does not stop"
