"""The HTTP server serves one embedded engine, from the bound port to the last answer.

EngineServer(config, options)   binds the port: a port in use is found before a model is loaded
run(announce)                   loads, serves until SIGINT or SIGTERM, answers what is under way with what it has
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web

import slime_spec
from rollout.embedded.engine import EmbeddedEngine
from rollout.embedded.http.access_log import access_logged
from rollout.embedded.http.answers import AnswerWriter
from rollout.embedded.http.calls import CallReader
from rollout.embedded.http.clients import CLIENTS, Clients, protocol_logger
from rollout.embedded.http.control_routes import ControlRoutes
from rollout.embedded.http.described import Description
from rollout.embedded.http.generate_routes import GenerateRoutes
from rollout.embedded.http.generations import Generations
from rollout.embedded.http.info_routes import InfoRoutes
from rollout.embedded.http.json_io import api_key_required, errors_as_json
from rollout.embedded.http.load_routes import LoadRoutes
from rollout.embedded.http.openai.routes import OpenAIRoutes
from rollout.embedded.http.running import CallRunner
from rollout.embedded.http.serving import OneThread, Serving, Totals, VersionNames
from rollout.embedded.http.weight_routes import WeightRoutes
from rollout.embedded.http.weight_session import WeightUpdates
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tokenizer import Tokenizer, check_vocabulary
from slime_spec.config.addresses import address_of
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.metrics.alarm import AcceptanceAlarm
from slime_spec.transports.in_process import InProcessTransport

logger = logging.getLogger(__name__)

LINGER_S = 1.0  # for the rest of a refused body: some clients read the answer only when they have sent all
SHUTDOWN_TIMEOUT_S = 5.0  # for answers that are being written when the server stops
QUEUE_PER_ROW = 64  # samples for each that the engine decodes at once
LEAST_QUEUE = 1024
Announce = Callable[[str], None]


@dataclass(frozen=True)
class ServerOptions:
    """Holds the server's address and limits.

    Port 0 takes a free port; with ``incremental_streaming`` a chunk has only what is new. ``max_queued_requests``
    counts samples (default: by what the engine decodes at once); ``client_timeout_s`` is how long a client may keep the
    server waiting, for a body or before it reads its answer. ``served_model_name`` is the checkpoint's folder if None.
    """

    host: str = "127.0.0.1"
    port: int = 30000
    api_key: str | None = None
    max_request_mb: int = 256
    incremental_streaming: bool = False
    max_queued_requests: int | None = None
    client_timeout_s: float = 60.0
    access_log: bool = True
    served_model_name: str | None = None

    def max_samples(self, max_running_requests: int) -> int:
        """Return how many samples may be under way or wait in all."""
        return self.max_queued_requests or max(LEAST_QUEUE, QUEUE_PER_ROW * max_running_requests)


class EngineServer:
    """Serves one engine. Raises ConfigError for a bad model or address before anything heavy starts."""

    def __init__(self, config: Config, options: ServerOptions) -> None:
        self._config, self._options = config, options
        self._spec = ModelSpec.from_folder(config.model.hf_checkpoint)
        self._tokenizer = Tokenizer.load(config.model.hf_checkpoint)
        check_vocabulary(self._tokenizer, self._spec)
        self._socket = bound_socket(options.host, options.port)
        self._engine = EmbeddedEngine(config, 0, InProcessTransport())

    @property
    def address(self) -> str:
        host, port = self._socket.getsockname()[:2]
        return f"http://{address_of(host, port)}"

    def run(self, announce: Announce) -> None:
        """Serve until SIGINT or SIGTERM; ``announce`` is called with the address when requests are answered."""
        asyncio.run(self._run(announce))

    async def _run(self, announce: Announce) -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await self.serve(announce, stop)

    async def serve(self, announce: Announce, stop: asyncio.Event) -> None:
        """Serve until ``stop`` is set."""
        await asyncio.to_thread(self._engine.start)
        max_samples = self._options.max_samples(self._config.engine.max_running_requests)
        generations = Generations(self._engine, max_samples)
        threads = OneThread("http-control"), OneThread("http-reading")
        try:
            await self._answer(self._serving(generations, *threads), announce, stop)
        finally:
            await asyncio.to_thread(self._engine.stop)
            for thread in threads:
                thread.close()
            generations.close()

    async def _answer(self, serving: Serving, announce: Announce, stop: asyncio.Event) -> None:
        app, info = make_app(serving, self._options)
        runner = web.AppRunner(
            app,
            handler_cancellation=True,
            shutdown_timeout=SHUTDOWN_TIMEOUT_S,
            access_log=None,  # access_logged writes it, of clients that go too
            lingering_time=LINGER_S,
            keepalive_timeout=self._options.client_timeout_s,
            logger=protocol_logger,
        )
        await runner.setup()
        server = runner.server
        assert server is not None, "a runner that was set up has its server"
        try:
            loop = asyncio.get_running_loop()
            listener = await loop.create_server(lambda: app[CLIENTS].connection(server), sock=self._socket)
            announce(self.address)
            await stop.wait()
            logger.info("stopping prompts_under_way=%d", serving.generations.num_prompts)
            info.stopping = True
            listener.close()
            await serving.generations.abort_all()
        finally:
            await runner.cleanup()

    def _serving(self, generations: Generations, control: OneThread, reading: OneThread) -> Serving:
        engine, algorithm = self._engine, self._config.speculative.record
        return Serving(
            config=self._config,
            model_name=self._options.served_model_name or self._config.model.hf_checkpoint,
            spec=self._spec,
            limits=engine.limits,
            tokenizer=self._tokenizer,
            engine=engine,
            generations=generations,
            control=control,
            reading=reading,
            names=VersionNames(lambda: engine.weight_version),
            totals=Totals(AcceptanceAlarm(algorithm) if algorithm.speculates else None),
        )


def make_app(serving: Serving, options: ServerOptions) -> tuple[web.Application, InfoRoutes]:
    """Return the application, and the part of it that must know when the server stops."""
    config = serving.config
    reader = CallReader(serving.limits, serving.tokenizer, config.run.seed, serving.generations.max_samples)
    writer = AnswerWriter(serving.tokenizer, serving.names, serving.limits.eos_token_ids)
    control = ControlRoutes(serving)
    info = InfoRoutes(serving, can_generate=lambda: not control.paused and not control.released)
    runner = CallRunner(serving)
    generate = GenerateRoutes(runner, reader, writer, options.incremental_streaming)
    openai = OpenAIRoutes(serving, runner, reader, writer)
    clients = Clients(options.max_request_mb * 10**6, options.client_timeout_s)
    keys = [api_key_required(options.api_key)] if options.api_key else []
    logs = [access_logged] if options.access_log else []
    middlewares = [*logs, clients.watched, errors_as_json, *keys]
    app = web.Application(middlewares=middlewares)
    app[CLIENTS] = clients
    load = LoadRoutes(serving)
    for part in (generate, openai, load, control, WeightRoutes(serving, WeightUpdates(serving)), info):
        app.add_routes(part.routes())
    description = Description(app, slime_spec.__version__, openai.bodies(), has_key=bool(options.api_key))
    app.add_routes(description.routes())
    return app, info


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket that has the address to itself; it does not listen yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            "--host and --port",
            f"must be an address that can be bound: {error}",
            address_of(host, port),
            "Pass --port 0.",
        ) from None
    return bound
