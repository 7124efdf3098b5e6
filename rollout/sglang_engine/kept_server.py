"""KeptServer starts or finds one engine's server, keeps it alive, replaces it, enters it in the router and ends it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from threading import Event, RLock
from typing import TypeVar

from rollout.sglang_engine.client import ServerGone, ServerRefused, SglangClient
from rollout.sglang_engine.external import use_server
from rollout.sglang_engine.launcher import Launcher
from rollout.sglang_engine.loop_thread import AsyncLoop
from rollout.sglang_engine.router import Requests, RoutedRequests
from rollout.sglang_engine.server import ServerProcess, ServerStartError
from rollout.sglang_engine.signs import Signs
from rollout.sglang_engine.supervise import Supervisor
from slime_spec.checkpoints.model_files import TargetFiles
from slime_spec.config.addresses import is_loopback, parse_address
from slime_spec.config.api_key import api_key_of
from slime_spec.config.server_checks import ADDRESSES
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError, PushError
from slime_spec.sglang.arguments import LOOPBACK
from slime_spec.sglang.interpreter import InstalledSglang, checked_in, installed_in
from slime_spec.sglang.server_info import Load, ServerInfo, load_of
from slime_spec.site import NodeLost, Site

logger = logging.getLogger(__name__)

T = TypeVar("T")
REENTER_TIMEOUT_S = 15.0
RELEASE, RESUME = "/release_memory_occupation", "/resume_memory_occupation"


class ServerUnfit(RuntimeError):
    """The server lives and may have other weights than it should have: only a new server surely has the right ones."""


class KeptServer:
    """Keeps the server of one engine: a process of its own, or an external server, which is never restarted.

    ``exclusive`` is held by whoever has the server to itself: a push, an offload, a replacement. ``speculates`` says
    whether the server has a draft, and whether the next server gets it. ``restore``, given to ``start``, brings a new
    server to the current weights before any sample is sent to it.
    """

    client: SglangClient
    info: ServerInfo
    loop: AsyncLoop

    def __init__(self, config: Config, engine_index: int, target: TargetFiles, site: Site) -> None:
        self._config, self._index, self._target, self._site = config, engine_index, target, site
        external = config.sglang_server.external_addrs
        self._external = external[engine_index] if external else None
        self.sglang = self._ask_interpreter()
        self._launcher = None if external else Launcher(config, engine_index, self.sglang, site)
        self._key = api_key_of(config)
        self._routed: RoutedRequests | None = None
        self.supervisor: Supervisor | None = None
        self.exclusive = RLock()
        settings = config.sglang_server
        self.signs = Signs(settings.stall_timeout_s, 0.0 if external else settings.start_timeout_s)
        self.resident = True
        self.speculates = config.speculative.record.speculates
        self._started = ExitStack()
        self._stopped = Event()

    def start(self, restore: Callable[[], None]) -> None:
        """Start the server, or check the external server, and read its /server_info; raises ConfigError."""
        self._restore_weights = restore
        self.loop = AsyncLoop(f"sglang-{self._index}")
        self._started.callback(self.loop.close)
        self.client = self.open(f"http://{self._external}" if self._launcher is None else self._launcher.url)
        if self._launcher is None:
            self.loop.call(use_server(self.client, self._config, self._index, self._target))
        else:
            self._supervise()
        self.info = ServerInfo.of(self.loop.call(self.client.get("/server_info")))

    def enter_router(self, in_place_of_dead: bool = False) -> None:
        """Have the run's router, if there is any, send requests to the server, which has the current weights.

        In the place of a dead engine, servers that do not listen any more are withdrawn: that engine could not do it.
        """
        address = self._config.sglang_server.router_addr
        if address is None:
            return
        url = self.client.url if self._launcher is None else self._launcher.reachable_url
        routed = RoutedRequests(self.open(f"http://{address}"), self.client, url, self._key)
        if in_place_of_dead:
            self.loop.call(routed.withdraw_dead())
        self.loop.call(routed.enter())
        self._routed = routed
        self._started.callback(lambda: self.loop.call(routed.withdraw()))

    def stop(self) -> None:
        self._stopped.set()
        self._started.close()

    def open(self, url: str) -> SglangClient:
        """Open a client of any server, with this run's key; it is closed when the server is stopped."""
        client = SglangClient(url, self._key, self._config.sglang_server.call_timeout_s)
        self.loop.call(client.open())
        self._started.callback(lambda: self.loop.call(client.close()))
        return client

    @property
    def requests(self) -> Requests:
        """Return where samples are generated: the router, or the server."""
        return self._routed or self.client

    @property
    def is_external(self) -> bool:
        return self._external is not None

    @property
    def own_host(self) -> str:
        """Return the address where the server reaches this process."""
        if self._launcher is not None:
            return self._launcher.reachable_host
        assert self._external is not None, "an engine has a server of its own or another's"
        return LOOPBACK if is_loopback(parse_address(ADDRESSES, self._external)[0]) else self._site.address

    @property
    def num_replaced(self) -> int:
        return 0 if self.supervisor is None else self.supervisor.num_replaced

    def replace(self, why: str) -> None:
        """Bring up a new server with the current weights; raises PushError for an external server."""
        if self.supervisor is None:
            raise PushError(f"the external server {self.client.url} cannot be restarted: {why}")
        self.supervisor.replace(why)

    def surviving(self, call: Callable[[], T], loss: str = "") -> T:
        """Make a call; where the server dies of it or is unfit, replace the server and make the call again.

        ``loss`` says why the server must be replaced before the first call; empty: it serves. A new server has the
        current weights. Raises PushError for an external server, and where the successors are lost as well.
        """
        for attempts_left in reversed(range(1 + max(1, self._config.sglang_server.max_restarts))):
            try:
                if loss:
                    self.replace(loss)
                return call()
            except (ServerGone, ServerUnfit, ServerStartError, NodeLost) as error:
                if not attempts_left:
                    raise PushError(f"engine {self._index} has no server that goes through with it: {error}") from error
                loss = str(error)
        raise AssertionError("the last attempt returns or raises")

    def set_resident(self, resident: bool) -> None:
        """Free the server's memory, or take it back."""
        try:
            self.loop.call(self.client.post(RESUME if resident else RELEASE))
            self.resident = resident
        except ServerGone as error:
            self.resident = resident  # the state that the next server is brought to
            self.replace(f"it died before it was {'resumed' if resident else 'released'}: {error}")
        if self.supervisor is not None:
            self.supervisor.may_restart = resident

    def load(self) -> Load:
        """Return the server's load; zeros where the server does not answer."""

        async def ask() -> object:
            try:
                return await self.client.get("/v1/loads")
            except (ServerRefused, ServerGone):
                return {}

        return load_of(self.loop.call(ask()))

    async def until_ready(self) -> None:
        """Return once the server serves; raises what ended it for good."""
        if self.supervisor is not None:
            await self.supervisor.until_ready()

    async def answers(self) -> bool:
        """Return whether the server answers in time a question that its scheduler must answer, paused or not."""
        if not await self.client.answers(self.signs.limit_s):
            return False
        self.signs.answered()
        return True

    def suspect(self) -> None:
        """Have the server checked, because a connection broke."""
        if self.supervisor is not None:
            self.supervisor.suspect()

    def wait_serving(self, known: bool) -> bool:
        """See MayStopServing."""
        if self.supervisor is None:  # nobody here looks after an external server
            self._stopped.wait()
            return known
        return self.supervisor.wait_serving(known)

    def _ask_interpreter(self) -> InstalledSglang:
        python = self._config.sglang_server.python
        if self._external is not None or python is None:
            return checked_in()
        return installed_in(python)

    def _supervise(self) -> None:
        self.supervisor = Supervisor(
            self._launch,
            self._restore,
            self.client,
            self.loop,
            self.exclusive,
            self.signs,
            self._config.sglang_server,
        )
        self._started.callback(self.supervisor.stop)
        try:
            self.supervisor.start()
        except (ServerStartError, NodeLost) as error:
            raise ConfigError(
                "rollout.engine", f"its server must start. {error}", "sglang", "Correct what the log names."
            ) from None

    def _launch(self) -> ServerProcess:
        assert self._launcher is not None, "no external server"
        if self._routed is not None:
            self.loop.call(self._routed.withdraw())
        return self._launcher.server(self.speculates)

    def _restore(self) -> None:
        self._restore_weights()
        if not self.resident:  # the trainer has the memory, and SGLang dies of resuming what it has not released
            self.loop.call(self.client.post(RELEASE))
        if self._routed is not None:
            try:
                self.loop.call(self._routed.enter(REENTER_TIMEOUT_S))
            except ConfigError as error:  # others serve; this server serves its own engine if the router is gone
                logger.error("the restarted server gets no routed requests reason=%s", error)
