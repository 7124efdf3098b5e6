"""A benchmark starts an SGLang engine in this process, and controls the engine's server."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http import HTTPStatus
from typing import Any

import psutil
from rich.console import Console

from rollout.sglang_engine import guard
from rollout.sglang_engine.client import ServerRefused, SglangClient
from rollout.sglang_engine.engine import SglangEngine
from rollout.sglang_engine.loop_thread import AsyncLoop
from slime_spec.bench.local_engine import greedy
from slime_spec.bench.prompts import Prompts
from slime_spec.bench.race import EngineSide
from slime_spec.bench.sglang.weights import Weights
from slime_spec.config.tree import Config
from slime_spec.transports.in_process import InProcessTransport
from slime_spec.types import GeneratedSample
from slime_spec.weights.messages import Side
from slime_spec.weights.run import PushReport, push_messages, run_push

Sums = Mapping[str, str]
FLUSH_ATTEMPTS, FLUSH_WAIT_S = 100, 0.1


class Server:
    """Holds one engine and its server. The benchmark controls the server on a connection of its own."""

    def __init__(
        self, engine: SglangEngine, config: Config, control: tuple[SglangClient, AsyncLoop], root: psutil.Process | None
    ) -> None:
        self.engine, self._config = engine, config
        self._client, self._loop = control
        self._root = root
        self._versions: dict[Side, int] = {"target": 0, "draft": 0}

    @property
    def address(self) -> str:
        """Return the server's host:port."""
        return self._client.url.removeprefix("http://")

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        return self._loop.call(self._client.post(path, body))

    def checksums(self, side: Side) -> Sums:
        """Return the server's checksum of every tensor of one side, of all ranks."""
        answer = self.ask("/weights_checker", {"action": "checksum", "selector": side})
        ranks = enumerate(answer["ranks"])
        return {f"{rank}:{name}": each for rank, payload in ranks for name, each in payload["checksums"].items()}

    def forget(self) -> None:
        """Drop the server's cached prefixes; a server that has not yet put its last request away is asked again."""
        for attempts_left in reversed(range(FLUSH_ATTEMPTS)):
            try:
                self.ask("/flush_cache")
                return
            except ServerRefused as error:
                if error.status != HTTPStatus.BAD_REQUEST or not attempts_left:
                    raise
            time.sleep(FLUSH_WAIT_S)

    def greedy(
        self, prompts: Prompts, num_new_tokens: int, stop_token_ids: tuple[int, ...] = ()
    ) -> list[GeneratedSample]:
        return greedy(self.engine, prompts, num_new_tokens, speculative=True, stop_token_ids=stop_token_ids)

    def push(self, weights: Weights, side: Side) -> PushReport:
        """Push the side's next version."""
        self._versions[side] += 1
        messages = push_messages(
            weights, self._versions[side], side, self._config.push.bucket_bytes, InProcessTransport()
        )
        return run_push(messages, lambda message: [self.engine.update_weights(message)])

    def cpu_s(self) -> float:
        """Return the CPU seconds of the server's processes."""
        assert self._root is not None, "a server that this engine started"
        times = [each.cpu_times() for each in (self._root, *self._root.children(recursive=True))]
        return sum(each.user + each.system for each in times)

    def kill(self) -> None:
        """Kill the server without a warning, as the kernel does when memory is out."""
        assert self._root is not None, "a server that this engine started"
        (process,) = self._root.children()
        process.kill()


class ServerSide(EngineSide):
    """Implements Side with a server, which speculates for all requests or for none."""

    def __init__(self, server: Server, speculative: bool) -> None:
        super().__init__(server.engine, speculative)
        self._server = server

    def cpu_s(self) -> float:
        return self._server.cpu_s()


@contextmanager
def started(config: Config) -> Iterator[Server]:
    """Start the engine; raises ConfigError where its server does not come up."""
    settings, algorithm = config.sglang_server, config.speculative.algorithm
    doing = "the same server" if settings.external_addrs else "starting a server"
    say(f"{doing}: {algorithm}, weights by {settings.transport}")
    with ExitStack() as running:
        before = _guards()
        engine = SglangEngine(config, 0, InProcessTransport())
        engine.start()
        running.callback(engine.stop)
        roots = [each for each in _guards() if each not in before]
        loop = AsyncLoop("bench")
        running.callback(loop.close)
        client = SglangClient(engine.client.url)
        loop.call(client.open())
        running.callback(lambda: loop.call(client.close()))
        yield Server(engine, config, (client, loop), roots[0] if roots else None)


def say(what: str) -> None:
    """Print a line of progress."""
    Console(stderr=True).print(what, markup=False, highlight=False)


def _guards() -> list[psutil.Process]:
    """Return the child processes under which servers run."""
    children = [each for each in psutil.Process().children() if each.status() != psutil.STATUS_ZOMBIE]
    return [each for each in children if guard.__file__ in each.cmdline()]
