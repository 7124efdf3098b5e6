"""A server that lives and does nothing is noticed and replaced, and one that is only paused or busy is not (case
sglang/01-hang).
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from aiohttp import web

from rollout.sglang_engine.client import SglangClient
from rollout.sglang_engine.engine import SglangEngine
from rollout.sglang_engine.fake import FakeServer, serving
from rollout.sglang_engine.loop_thread import AsyncLoop
from rollout.sglang_engine.server import ServerProcess
from rollout.sglang_engine.signs import Signs
from rollout.sglang_engine.supervise import Supervisor
from slime_spec.config.sglang_server import SglangServerConfig
from slime_spec.config.tree import Config
from slime_spec.types import GroupRequest, SamplingParams
from slime_spec.weights.messages import ContinueGeneration, PauseGeneration
from tests.sglang.conftest import Connect
from tests.sglang.test_odd_answers import whole
from tests.support.pushes import DirectTransport

PROMPT = (5, 6, 7)
WAIT_S = 60.0  # the longest that a test waits for what must come


class Hanging(FakeServer):
    """Hangs while ``hangs`` is set: it accepts connections, generates nothing and answers nothing."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.hangs = threading.Event()
        self.questions = threading.Semaphore(0)

    async def _info(self, request: web.Request) -> web.Response:
        self.questions.release()
        if self.hangs.is_set():
            await never()
        return await super()._info(request)

    async def _answer(self, request: web.Request, body: Any, chunks: Any, status: int = 200) -> web.StreamResponse:
        async def until_it_hangs() -> Any:
            async for chunk in chunks:
                if self.hangs.is_set():
                    await never()
                yield chunk

        return await super()._answer(request, body, until_it_hangs(), status)

    def wait_asked(self, times: int) -> None:
        for _ in range(times):
            assert self.questions.acquire(timeout=WAIT_S), "nobody asks the server"


async def never() -> None:
    await asyncio.Event().wait()


def test_silence_is_the_age_of_the_oldest_streams_last_chunk_or_of_the_last_answer() -> None:
    now = [0.0]
    signs = Signs(10.0, 100.0, clock=lambda: now[0])
    signs.opened("a")
    now[0] = 99.0
    assert not signs.is_silent, "kernels are compiled before the first token"
    signs.heard("a")
    signs.opened("b")
    now[0] = 108.0
    signs.heard("a")
    assert not signs.is_silent
    now[0] = 110.0
    assert signs.is_silent, "b has brought nothing, whatever a brings"
    signs.answered()
    assert not signs.is_silent
    now[0] = 121.0
    assert signs.is_silent
    signs.heard("a")
    signs.closed("b")
    assert not signs.is_silent
    signs.closed("a")
    assert signs.is_silent, "without streams the last answer counts"
    signs.begin_anew()
    now[0] = 220.0
    assert not signs.is_silent, "a new server compiles anew"


class Process(ServerProcess):
    """A process that always lives; ``stop`` unhangs the fake, as a new server would be."""

    def __init__(self, server: Hanging) -> None:
        super().__init__([], {}, Path("log"))
        self._fake = server

    def start(self) -> None:
        pass

    @property
    def is_alive(self) -> bool:
        return True

    def stop(self) -> None:
        self._fake.hangs.clear()


@contextmanager
def supervised(
    server: Hanging, stall_timeout_s: float = 0.5, exclusive: threading.RLock | None = None
) -> Iterator[Supervisor]:
    """A supervisor for whom the server is silent at every look: only its answers count."""
    settings = SglangServerConfig(stall_timeout_s=stall_timeout_s, start_timeout_s=WAIT_S)
    loop = AsyncLoop("supervised")
    with serving(server) as address:
        client = SglangClient(f"http://{address}")
        loop.call(client.open())
        ticks = iter(range(10**9))
        signs = Signs(0.0, 0.0, clock=lambda: float(next(ticks)))
        supervisor = Supervisor(
            lambda: Process(server), lambda: None, client, loop, exclusive or threading.RLock(), signs, settings
        )
        supervisor.start()
        try:
            yield supervisor
        finally:
            supervisor.stop()
            loop.call(client.close())
            loop.close()


def test_a_server_that_does_not_answer_is_replaced_and_serves_again() -> None:
    server = Hanging()
    with supervised(server) as supervisor:
        server.wait_asked(1)
        assert supervisor.num_restarts == 0
        server.hangs.set()
        assert supervisor.wait_serving(True) is False
        assert supervisor.wait_serving(False) is True
        assert (supervisor.num_restarts, supervisor.num_replaced) == (1, 1)
        assert supervisor.answers(WAIT_S)


def test_a_paused_server_answers_and_is_not_replaced_although_its_health_is_bad() -> None:
    server = Hanging()
    with supervised(server, stall_timeout_s=WAIT_S) as supervisor:
        client, loop = supervisor._client, supervisor._loop
        loop.call(client.post("/pause_generation", {"mode": "in_place"}))
        assert not loop.call(client.is_healthy())
        supervisor.suspect()
        server.wait_asked(3)
        assert supervisor.answers(WAIT_S)
        assert supervisor.num_restarts == 0


def test_nobody_asks_a_server_that_somebody_has_to_himself_or_whose_memory_is_given_away() -> None:
    server, exclusive = Hanging(), threading.RLock()
    with supervised(server, stall_timeout_s=WAIT_S, exclusive=exclusive) as supervisor:
        asked: list[str] = []
        with exclusive:
            server.hangs.set()
            asking = threading.Thread(target=lambda: asked.append(supervisor._silence()))
            asking.start()
            asking.join(WAIT_S)
            server.hangs.clear()
        assert asked == [""]
        supervisor.may_restart = False
        server.hangs.set()
        assert supervisor._silence() == ""
        server.hangs.clear()


@pytest.mark.parametrize(("status", "lives"), [(200, True), (401, True), (404, True), (500, False), (503, False)])
def test_only_a_failing_server_does_not_answer(status: int, lives: bool) -> None:
    class Answering(FakeServer):
        async def _info(self, request: web.Request) -> web.Response:
            return web.json_response({}, status=status)

    loop = AsyncLoop("answers")
    with serving(Answering()) as address:
        client = SglangClient(f"http://{address}")
        loop.call(client.open())
        assert loop.call(client.answers(WAIT_S)) is lives
        loop.call(client.close())
    loop.close()


def send_signal(engine: SglangEngine, number: signal.Signals) -> None:
    assert engine.server.supervisor is not None
    process = engine.server.supervisor.server._process
    assert process is not None
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.send_signal(number)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_samples_of_a_stopped_process_go_on_at_its_successor(
    config: Config, monkeypatch: pytest.MonkeyPatch, process_path: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", process_path)
    engine = SglangEngine(
        replace(config, sglang_server=replace(config.sglang_server, stall_timeout_s=2.0)), 0, DirectTransport()
    )
    engine.start()
    try:
        request = GroupRequest("group", PROMPT, (1, 2), SamplingParams(max_new_tokens=300))
        generation = engine.generate(request)
        wait_until(lambda: any(run.num_tokens for run in engine.samples.in_progress))
        send_signal(engine, signal.SIGSTOP)
        assert [sample.token_ids for sample in generation] == [whole(300)] * 2
        wait_until(lambda: engine.stats().num_restarts == 1)
        assert len(list(engine.generate(replace(request, seeds=(3,))))) == 1
        send_signal(engine, signal.SIGSTOP)  # one that hangs with nothing to do is noticed too
        wait_until(lambda: engine.stats().num_restarts == 2)
    finally:
        engine.stop()


def test_samples_of_an_external_server_that_hangs_end_with_an_error_that_names_it(connect: Connect) -> None:
    server = Hanging(delay_s=0.005)
    engine = connect(server, stall_timeout_s=0.3).engine
    generation = engine.generate(GroupRequest("group", PROMPT, (1,), SamplingParams(max_new_tokens=400)))
    wait_until(lambda: any(run.num_tokens for run in engine.samples.in_progress))
    server.hangs.set()
    with pytest.raises(RuntimeError, match=rf"breaks off again and again: {engine.client.url} does not answer"):
        list(generation)
    server.hangs.clear()


def test_samples_of_an_external_server_that_is_paused_wait(connect: Connect) -> None:
    server = Hanging(delay_s=0.005)
    engine = connect(server, stall_timeout_s=0.1).engine
    generation = engine.generate(GroupRequest("group", PROMPT, (1,), SamplingParams(max_new_tokens=100)))
    wait_until(lambda: any(run.num_tokens for run in engine.samples.in_progress))
    engine.update_weights(PauseGeneration(0, "in_place"))
    while server.questions.acquire(blocking=False):
        pass
    server.wait_asked(2)
    engine.update_weights(ContinueGeneration(0))
    assert [sample.token_ids for sample in generation] == [whole(100)]
    assert engine.stats().num_interruptions == 0
