"""Supervisor keeps one server alive: it launches, watches and restarts the server, and restores its weights.

serving ──(process ended, or twice no answer)──► down ──restart, restore──► serving
                                                   └──(too often)──► failed

The server is asked when a connection broke, and when nothing has come from it for too long (Signs). The question
generates nothing, and a paused server answers it. Who has the server to itself has deadlines of its own.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable

from rollout.sglang_engine.client import SglangClient
from rollout.sglang_engine.loop_thread import AsyncLoop
from rollout.sglang_engine.server import ServerProcess, ServerStartError
from rollout.sglang_engine.signs import Signs
from slime_spec.config.sglang_server import SglangServerConfig

logger = logging.getLogger(__name__)

WATCH_S = 0.5
NUM_QUESTIONS = 2
# A server takes ports that nobody can hold for it, its own choices among them: a new start has new ones.
PORT_ATTEMPTS = 3


class EngineFailed(RuntimeError):
    """The server died more often than it may be restarted, or did not come up again."""


class Stopped(RuntimeError):
    """The engine was stopped while its server was being replaced."""


class Supervisor:
    """Watches the server from a thread of its own.

    ``launch`` makes a new, not yet started process; ``restore`` brings it to the current weights and is called, with
    the server healthy, before any sample is sent to it. ``exclusive`` is held while the server is being replaced: who
    else holds it (a push, an offload) has the server to itself. A server that is asked and does not answer within
    ``stall_timeout_s`` hangs.
    """

    def __init__(
        self,
        launch: Callable[[], ServerProcess],
        restore: Callable[[], None],
        client: SglangClient,
        loop: AsyncLoop,
        exclusive: threading.RLock,
        signs: Signs,
        settings: SglangServerConfig,
    ) -> None:
        self._launch, self._restore = launch, restore
        self._client, self._loop, self._exclusive = client, loop, exclusive
        self._signs, self._settings = signs, settings
        self.num_restarts = 0  # attempts to restart a server that died
        self.may_restart = True  # not while a trainer has the memory that a server takes at its start
        self.num_replaced = 0  # servers that have replaced another, for whatever reason
        self._server: ServerProcess | None = None
        self._failure: EngineFailed | None = None
        self._ready = asyncio.Event()
        self._serves = False
        self._changed = threading.Condition()
        self._suspected = threading.Event()
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="sglang-watch", daemon=True)

    def start(self) -> None:
        """Launch the server, wait for its health, go on watching; raises ServerStartError or ConfigError."""
        self._bring_up()
        self._set_ready(True)
        self._watcher.start()

    def stop(self) -> None:
        self._stopping.set()
        self._suspected.set()
        with self._changed:
            self._changed.notify_all()
        if self._watcher.is_alive() and threading.current_thread() is not self._watcher:
            self._watcher.join()
        if self._server is not None:
            self._server.stop()

    @property
    def server(self) -> ServerProcess:
        assert self._server is not None, "started"
        return self._server

    async def until_ready(self) -> None:
        """Return once the server serves; raises EngineFailed when it never will again."""
        await self._ready.wait()
        if self._failure is not None:
            raise self._failure

    def wait_serving(self, known: bool) -> bool:
        """Do what MayStopServing says; return ``known`` when the supervisor ends."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._serves != known or self._failure is not None or self._stopping.is_set()
            )
        if self._failure is not None:
            raise self._failure
        return known if self._stopping.is_set() else not known

    def suspect(self) -> None:
        """Check the server now, because a connection broke."""
        self._suspected.set()

    def replace(self, why: str) -> None:
        """End the server and bring up a new server from ``launch``; raises Stopped if the engine stops meanwhile."""
        with self._exclusive:
            logger.warning("replacing the server reason=%s", why)
            self._set_ready(False)
            self.server.stop()
            self._bring_up()
            self._restore()
            self.num_replaced += 1
            self._set_ready(True)

    def _bring_up(self) -> None:
        for attempts_left in reversed(range(PORT_ATTEMPTS)):
            try:
                return self._bring_up_once()
            except ServerStartError as error:
                if not (error.port_taken and attempts_left):
                    raise
                logger.warning("a port was taken while the server started; starting it again reason=%s", error)

    def _bring_up_once(self) -> None:
        server = self._launch()
        server.start()
        self._server = server
        try:
            server.wait_until(self._is_healthy, self._settings.start_timeout_s)
        except (ServerStartError, Stopped):
            server.stop()
            raise
        self._signs.begin_anew()

    def _is_healthy(self) -> bool:
        if self._stopping.is_set():
            raise Stopped("the engine is being stopped")
        return self._loop.call(self._client.is_healthy())

    def _watch(self) -> None:
        while not self._stopping.is_set():
            suspected = self._suspected.wait(WATCH_S)
            self._suspected.clear()
            if self._stopping.is_set():
                return
            num_replaced = self.num_replaced
            why = self._trouble() if suspected or not self.server.is_alive else self._silence()
            if why and not self._recover(why, num_replaced):
                return

    def _trouble(self) -> str:
        """Ask the server; return why it must be replaced, or an empty string."""
        server, timeout_s = self.server, self._settings.stall_timeout_s
        for _ in range(NUM_QUESTIONS):
            if not server.is_alive:
                return f"its process ended with code {server.exit_code}; {server.tail()[-500:]}"
            if self.answers(timeout_s / NUM_QUESTIONS) or self._stopping.is_set():
                return ""
        return f"it does not answer within {timeout_s:g} s (--sglang-stall-timeout)" if server.is_alive else "it ended"

    def answers(self, timeout_s: float) -> bool:
        """Return whether the server answers a question that its scheduler must answer, paused or not."""
        if not self._loop.call(self._client.answers(timeout_s)):
            return False
        self._signs.answered()
        return True

    def _silence(self) -> str:
        """Ask a server that has been silent; one that somebody has to himself, or that is offloaded, is not asked."""
        if not (self._signs.is_silent and self.may_restart and self._exclusive.acquire(blocking=False)):
            return ""
        try:
            return self._trouble()
        finally:
            self._exclusive.release()

    def _recover(self, why: str, num_replaced: int) -> bool:
        """Replace the server, again if need be; False when the engine is stopped, or has failed for good.

        ``num_replaced`` is the count from before the server was asked.
        """
        self._set_ready(False)  # at once: whoever has the server to itself may yet take long to give up
        had_to_wait = not self._exclusive.acquire(blocking=False)
        if had_to_wait:
            self._exclusive.acquire()
        try:
            if self._stopping.is_set():
                return False
            if (had_to_wait or self.num_replaced != num_replaced) and not self._trouble():
                self._set_ready(True)
                return True  # a push that met the dead server has replaced it meanwhile
            if not self.may_restart:
                self._set_ready(self.server.is_alive)  # who gives the memory back finds the server dead
                return True
            return self._restart(why)
        finally:
            self._exclusive.release()

    def _restart(self, why: str) -> bool:
        while self.num_restarts < self._settings.max_restarts:
            self.num_restarts += 1
            try:
                self.replace(f"{why} restart={self.num_restarts}")
                return True
            except Stopped:
                return False
            except Exception as error:
                logger.exception("the server did not come back")
                why = str(error)
        self._failure = EngineFailed(f"the server died {self.num_restarts + 1} times; the last time: {why}")
        self._set_ready(True)  # wakes whoever waits, to raise the failure
        return False

    def _set_ready(self, ready: bool) -> None:
        async def change() -> None:
            self._ready.set() if ready else self._ready.clear()

        self._loop.call(change())
        with self._changed:
            self._serves = ready
            self._changed.notify_all()
