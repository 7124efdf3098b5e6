"""Fake servers that an engine starts, loses and replaces in milliseconds: threads where SGLang has processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from aiohttp import web

from rollout.sglang_engine.client import SglangClient
from rollout.sglang_engine.engine import SglangEngine
from rollout.sglang_engine.fake import FakeServer, serving
from rollout.sglang_engine.server import ServerProcess
from rollout.sglang_engine.transports.bucket import NamedTensors
from slime_spec.config.tree import Config
from slime_spec.ports import free_port
from slime_spec.weights.checksums import tensor_checksum
from tests.support.pushes import DirectTransport

UPDATES = "/update_weights_from_tensor"


class ChecksumServer(FakeServer):
    """A fake server whose checksums are of the tensors that a ChecksumTransport has told it."""

    async def _check(self, request: web.Request) -> web.Response:
        side = (await self._body(request))["selector"]
        sums = {name: f"{checksum:x}" for name, checksum in loaded(self, side).items()}
        return web.json_response({"ranks": [{"checksums": {f"{side}.of_the_checkpoint": "0", **sums}}]})


class FakeProcess(ServerProcess):
    """A fake server under the name of a process: it is alive until it is dead or stopped."""

    def __init__(self, server: FakeServer, port: int) -> None:
        super().__init__([], {}, Path("no.log"))
        self._server, self._port = server, port
        self._stack = ExitStack()

    def start(self) -> None:
        self._stack.enter_context(serving(self._server, self._port))

    @property
    def is_alive(self) -> bool:
        return self._server.state != "dead"

    @property
    def exit_code(self) -> int | None:
        return None if self.is_alive else 137

    def stop(self) -> None:
        self._server.state = "dead"
        self._stack.close()

    def tail(self) -> str:
        return ""


class FakeLauncher:
    """Starts what ``make`` makes, in place of a Launcher; ``servers`` are all that it has started, oldest first."""

    def __init__(self, make: Callable[[], FakeServer]) -> None:
        self._make, self._port = make, free_port("127.0.0.1")
        self.servers: list[FakeServer] = []
        self.url = self.reachable_url = f"http://127.0.0.1:{self._port}"
        self.reachable_host = "127.0.0.1"

    def server(self, speculate: bool) -> ServerProcess:
        self.servers.append(self._make())
        return FakeProcess(self.servers[-1], self._port)


class ChecksumTransport:
    """Tells a fake server the names and checksums of the tensors that a real server would load."""

    async def open(self, client: SglangClient) -> None: ...

    async def send(self, client: SglangClient, bucket: NamedTensors, fields: Mapping[str, Any]) -> None:
        sums = {name: tensor_checksum(tensor) for name, tensor in bucket}
        await client.post(UPDATES, {"checksums": sums, **fields})

    async def close(self, client: SglangClient) -> None: ...


def loaded(server: FakeServer, side: str) -> dict[str, int]:
    """The checksums of the tensors that the server has of one side; empty for its checkpoint's."""
    sums: dict[str, int] = {}
    for body in server.told(UPDATES):
        if body["selector"] == side:
            sums |= body["checksums"]
    return sums


def engine_on_fakes(config: Config, make: Callable[[], ChecksumServer]) -> tuple[SglangEngine, FakeLauncher]:
    """An engine whose servers are fakes, started."""
    engine, launcher = SglangEngine(config, 0, DirectTransport()), FakeLauncher(make)
    engine.server._launcher = launcher  # type: ignore[assignment]
    engine.start()
    engine.weights.delivery._transport = ChecksumTransport()
    return engine, launcher
