"""The SGLang engine behind the RolloutEngine seam: one real server, its requests, its weights."""

from __future__ import annotations

import asyncio
import logging
import sys
from contextlib import ExitStack
from pathlib import Path
from threading import RLock

import psutil
import torch

from rollout.sglang_engine.arguments import Place, command_line, server_flags
from rollout.sglang_engine.canary import Canary
from rollout.sglang_engine.client import ServerGone, ServerRefused, SglangClient
from rollout.sglang_engine.contract import detect
from rollout.sglang_engine.delivery import Delivery
from rollout.sglang_engine.draft_watch import DraftWatch
from rollout.sglang_engine.generation import SampleRun, SglangGeneration
from rollout.sglang_engine.installed import InstalledSglang, checked_in, installed_in
from rollout.sglang_engine.limits import check_request
from rollout.sglang_engine.loop_thread import AsyncLoop
from rollout.sglang_engine.model_files import TargetFiles, draft_files
from rollout.sglang_engine.sample import Reading
from rollout.sglang_engine.server import ServerProcess, ServerStartError, check_port, free_port
from rollout.sglang_engine.server_info import ServerInfo, load_of
from rollout.sglang_engine.supervise import Supervisor
from rollout.sglang_engine.transports.bucket import ServerTransport
from rollout.sglang_engine.weights import ServerWeights
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError, PushError
from slime_spec.interfaces import WeightTransport
from slime_spec.types import EngineStats, GeneratedSample, GroupRequest
from slime_spec.weights.push import PushMessage, PushReply

logger = logging.getLogger(__name__)

# A crash must be seen at once: SGLang otherwise waits minutes for dumps that nobody asked for.
SERVER_ENVIRONMENT = {"SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0", "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0"}


# SGLang keeps some positions of the context for drafts.
CANARY_MARGIN = 64


class Offloaded(RuntimeError):
    """A request to an engine whose memory is released."""


class SglangEngine:
    """A RolloutEngine whose server is a process of its own, or one that somebody else started.

    The server's weights change only while it is paused; a sample across a push says so in its version spans.

    Example::

        engine = SglangEngine(config, engine_index=0, transport=transport)
        engine.start()
        for sample in engine.generate(request):
            ...
        engine.stop()
    """

    def __init__(self, config: Config, engine_index: int, transport: WeightTransport) -> None:
        self._config, self._index, self._transport = config, engine_index, transport
        self._target = TargetFiles.read(config.model.hf_checkpoint)
        self._draft = draft_files(config, self._target)
        self._external = config.sglang_server.external_addrs
        self._sglang = self._ask_interpreter()
        self._place = self._choose_place()
        self._exclusive = RLock()
        self._supervisor: Supervisor | None = None
        self._resident = True
        self._runs: set[SampleRun] = set()
        self._started = ExitStack()
        self._command(speculate=True)  # for its errors, before anything starts

    # The way to the server, for sample runs (Link).

    @property
    def client(self) -> SglangClient:
        return self._client

    @property
    def reading(self) -> Reading:
        fills = self._config.speculative.algorithm != "NGRAM"
        return Reading(self._index, self._info.num_steps if self._watch.speculates else 0, fills)

    @property
    def weights_key(self) -> str:
        return f"weights-{self._weights.version('target')}"

    @property
    def draft_version(self) -> int | None:
        return None if self._draft is None or not self._watch.speculates else self._weights.version("draft")

    async def until_ready(self) -> None:
        if self._supervisor is not None:
            await self._supervisor.until_ready()

    def suspect(self) -> None:
        if self._supervisor is not None:
            self._supervisor.suspect()

    # RolloutEngine

    def start(self) -> None:
        self._loop = AsyncLoop(f"sglang-{self._index}")
        key = self._config.sglang.get("api_key")
        url = f"http://{self._external[self._index]}" if self._external else self._place.url
        self._client = SglangClient(url, None if key is None else str(key))
        self._loop.call(self._client.open())
        self._started.callback(self._loop.close)
        self._started.callback(lambda: self._loop.call(self._client.close()))
        self._make_parts()
        try:
            self._start_server()
            self._info = ServerInfo.of(self._loop.call(self._client.get("/server_info")))
            self._weights.delivery = self._make_delivery()
            if self._draft is not None:
                self._weights.remember_draft()
        except BaseException:
            self.stop()
            raise

    def generate(self, request: GroupRequest) -> SglangGeneration:
        check_request(request, self._target, self._config)
        if not self._resident:
            raise Offloaded("the engine is offloaded: call set_resident(True) before generating")
        self._watch.canary.see(request.prompt_token_ids)
        runs = [SampleRun(request, index, self) for index in range(len(request.seeds))]
        generation = SglangGeneration(request, lambda: self._loop.call(_abort_all(runs)))
        self._runs.update(runs)
        for run in runs:
            self._loop.submit(self._drive(run, generation))
        return generation

    def update_weights(self, message: PushMessage) -> PushReply:
        with self._exclusive:
            return self._weights.update(message)

    def set_resident(self, resident: bool) -> None:
        with self._exclusive:
            if resident == self._resident:
                return
            if not resident and self._runs:
                raise Offloaded("requests are running: offload the engine when they have finished")
            path = "/resume_memory_occupation" if resident else "/release_memory_occupation"
            self._loop.call(self._client.post(path))
            self._resident = resident
            if resident:
                self._watch.after_offload()

    def stats(self) -> EngineStats:
        load = load_of(self._loop.call(self._load()))
        return EngineStats(
            weight_version=self._weights.version("target"),
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            kv_tokens_used=load.num_used_tokens,
            kv_tokens_capacity=self._info.max_total_tokens,
            resident=self._resident,
            rss_bytes=psutil.Process().memory_info().rss,
            draft_version=self._weights.version("draft"),
        )

    def stop(self) -> None:
        """End the server; samples still being generated fail with RuntimeError at their callers."""
        self._started.close()

    # Starting

    def _make_parts(self) -> None:
        config, settings = self._config, self._config.sglang_server
        self._weights = ServerWeights(
            config,
            self._index,
            (self._target, self._draft),
            self._transport,
            self._client,
            self._loop,
            self._replace_server,
            lambda: self._watch.after_push(),
        )
        longest = (config.engine.context_length or self._target.context_length) - settings.canary_tokens - CANARY_MARGIN
        self._watch = DraftWatch(
            Canary(settings.canary_prompts, settings.canary_tokens, settings.canary_drop, longest),
            self._weights,
            self._client,
            self._loop,
            self._replace_server,
            speculates=config.speculative.algorithm != "NONE",
            has_weights=self._draft is not None,
        )

    def _replace_server(self, why: str) -> None:
        if self._supervisor is None:
            raise PushError(f"the external server {self._client.url} cannot be restarted: {why}")
        self._supervisor.replace(why)

    def _ask_interpreter(self) -> InstalledSglang:
        python = self._config.sglang_server.python
        if self._external or python is None:
            return checked_in()
        return installed_in(python)

    def _choose_place(self) -> Place:
        settings = self._config.sglang_server
        if self._external:
            if len(self._external) < self._config.rollout.num_engines:
                raise ConfigError(
                    "sglang_server.external_addrs",
                    f"must have one server for each of the {self._config.rollout.num_engines} engines",
                    self._external,
                    "Name more servers, or lower --rollout-num-engines.",
                )
            return Place("external", 0)
        if settings.port == 0:
            return Place(settings.host, free_port(settings.host))
        port = settings.port + self._index
        check_port(settings.host, port)
        return Place(settings.host, port)

    def _command(self, speculate: bool) -> list[str]:
        settings = self._config.sglang_server
        flags = server_flags(self._config, self._index, self._place, speculate)
        return command_line(settings.python or sys.executable, flags, settings.extra_args, self._sglang)

    def _launch(self) -> ServerProcess:
        run = self._config.run
        folder = Path(run.output_dir or f"runs/{run.name}")
        log = folder / "engines" / f"sglang-{self._index}.log"
        return ServerProcess(self._command(self._watch.speculates), SERVER_ENVIRONMENT, log.absolute())

    def _start_server(self) -> None:
        settings = self._config.sglang_server
        if self._external:
            if not self._loop.call(self._client.is_healthy(settings.start_timeout_s)):
                raise ConfigError(
                    "sglang_server.external_addrs", "must answer", self._client.url, "Start it, or correct the address."
                )
            return
        self._supervisor = Supervisor(
            self._launch,
            lambda: self._weights.restore(self._watch.speculates),
            self._client,
            self._loop,
            self._exclusive,
            settings.start_timeout_s,
            settings.max_restarts,
        )
        self._started.callback(self._supervisor.stop)
        try:
            self._supervisor.start()
        except ServerStartError as error:
            raise ConfigError(
                "rollout.engine", f"its server must start. {error}", "sglang", "Correct what the log names."
            ) from None

    def _make_delivery(self) -> Delivery:
        settings = self._config.sglang_server
        contract = self._loop.call(detect(self._client))
        logger.info("server ready version=%s contract=%s", self._info.version, contract)
        external_draft = self._draft is not None and not self._draft.in_target
        return Delivery(
            self._client,
            contract,
            self._make_transport(settings.transport),
            settings.transport,
            external_draft,
            self._config.push.bucket_bytes,
        )

    def _make_transport(self, name: str) -> ServerTransport:
        num_ranks, on_gpu = self._info.num_ranks, self._config.rollout.num_gpus_per_engine > 0
        if name == "disk":
            from rollout.sglang_engine.transports.disk import DiskTransport

            return DiskTransport(self._config.model.hf_checkpoint)
        if name == "distributed":
            from rollout.sglang_engine.transports.distributed import DistributedTransport

            return DistributedTransport(self._config.sglang_server.host, num_ranks, on_gpu, f"push-{self._index}")
        from rollout.sglang_engine.transports.tensor import TensorTransport, check_torch

        check_torch(self._sglang.torch_version)
        return TensorTransport(num_ranks, on_gpu and torch.cuda.is_available())

    # Samples

    async def _drive(self, run: SampleRun, generation: SglangGeneration) -> None:
        try:
            arrived: GeneratedSample | BaseException = await run.run()
        except asyncio.CancelledError:
            generation.deliver(RuntimeError("the engine stopped before the group was finished"))
            raise
        except Exception as error:  # noqa: BLE001 - handed to the caller, who raises it
            arrived = error
        finally:
            self._runs.discard(run)
        generation.deliver(arrived)

    async def _load(self) -> object:
        try:
            return await self._client.get("/v1/loads")
        except (ServerRefused, ServerGone):
            return {}


async def _abort_all(runs: list[SampleRun]) -> None:
    await asyncio.gather(*(run.abort() for run in runs))
