"""The SGLang engine behind the RolloutEngine seam: one real server, its requests, its weights."""

from __future__ import annotations

import asyncio
import logging
from contextlib import ExitStack
from threading import Event, RLock

import psutil
import torch

from rollout.sglang_engine.canary import Canary
from rollout.sglang_engine.client import ServerGone, ServerRefused, SglangClient
from rollout.sglang_engine.contract import detect
from rollout.sglang_engine.delivery import Delivery
from rollout.sglang_engine.draft_watch import DraftWatch
from rollout.sglang_engine.external import use_server
from rollout.sglang_engine.generation import SampleRun, SglangGeneration
from rollout.sglang_engine.launcher import Launcher
from rollout.sglang_engine.limits import check_request
from rollout.sglang_engine.loop_thread import AsyncLoop
from rollout.sglang_engine.router import Requests, RoutedRequests
from rollout.sglang_engine.sample import Reading
from rollout.sglang_engine.server import ServerProcess, ServerStartError
from rollout.sglang_engine.server_info import ServerInfo, load_of
from rollout.sglang_engine.supervise import Supervisor
from rollout.sglang_engine.transports.bucket import ServerTransport
from rollout.sglang_engine.weights import ServerWeights
from slime_spec.checkpoints.model_files import TargetFiles, draft_files
from slime_spec.config.addresses import is_loopback, parse_address
from slime_spec.config.server_checks import ADDRESSES
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError, PushError
from slime_spec.interfaces import WeightTransport
from slime_spec.sglang.arguments import LOOPBACK, config_of_engine
from slime_spec.sglang.installed import InstalledSglang, checked_in, installed_in
from slime_spec.sglang.labels import label_suffix
from slime_spec.site import HERE, NodeLost, Site
from slime_spec.types import EngineStats, GeneratedSample, GroupRequest
from slime_spec.weights.push import ContinueGeneration, PauseGeneration, PushMessage, PushReply, VerifyPush
from slime_spec.weights.stage import PushDesk

logger = logging.getLogger(__name__)

# SGLang keeps some positions of the context for drafts.
CANARY_MARGIN = 64
REENTER_TIMEOUT_S = 15.0
RELEASE, RESUME = "/release_memory_occupation", "/resume_memory_occupation"
# Asked again of a server that takes the place of a dead one: none of them changes what a push has staged.
AROUND_PUSH = (PauseGeneration, ContinueGeneration, VerifyPush)


class Offloaded(RuntimeError):
    """A request to an engine whose memory is released."""


class SglangEngine:
    """A RolloutEngine whose server is a process of its own, or one that somebody else started.

    The server's weights change only while it is paused; a sample across a push says so in its version spans. ``site``
    says where the engine is, and what other nodes it has.

    Example::

        engine = SglangEngine(config, engine_index=0, transport=transport)
        engine.start()
        for sample in engine.generate(request):
            ...
        engine.stop()
    """

    def __init__(self, config: Config, engine_index: int, transport: WeightTransport, site: Site = HERE) -> None:
        self._config = config = config_of_engine(config, engine_index)
        self._index, self._transport = engine_index, transport
        self._target = TargetFiles.read(config.model.hf_checkpoint)
        self._draft = draft_files(config, self._target)
        external = config.sglang_server.external_addrs
        self._external = external[engine_index] if external else None
        self._sglang = self._ask_interpreter()
        self._launcher = None if external else Launcher(config, engine_index, self._sglang, site)
        self._site = site
        self._routed: RoutedRequests | None = None
        self._exclusive = RLock()
        self._supervisor: Supervisor | None = None
        self._resident = True
        self._runs: set[SampleRun] = set()
        self._started = ExitStack()
        self._stopped = Event()

    # The way to the server, for sample runs (Link).

    @property
    def client(self) -> SglangClient:
        """To the engine's own server."""
        return self._client

    @property
    def requests(self) -> Requests:
        return self._routed or self._client

    @property
    def reading(self) -> Reading:
        fills = self._config.speculative.algorithm != "NGRAM"
        num_steps = self._info.num_steps if self._watch.speculates else 0
        return Reading(self._index, num_steps, fills, self._target.eos_token_ids)

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

    # MayStopServing

    def wait_serving(self, known: bool) -> bool:
        if self._supervisor is None:  # nobody here looks after an external server
            self._stopped.wait()
            return known
        return self._supervisor.wait_serving(known)

    # RolloutEngine

    def start(self) -> None:
        self._loop = AsyncLoop(f"sglang-{self._index}")
        self._started.callback(self._loop.close)
        url = f"http://{self._external}" if self._launcher is None else self._launcher.url
        self._client = self._open(url)
        self._make_parts()
        try:
            self._start_server()
            self._info = ServerInfo.of(self._loop.call(self._client.get("/server_info")))
            self._weights.delivery = self._make_delivery()
            if self._draft is not None:
                self._weights.remember_draft()
            self._enter_router()
        except BaseException:
            self.stop()
            raise

    def generate(self, request: GroupRequest) -> SglangGeneration:
        check_request(request, self._target, self._config)
        if not self._resident:
            raise Offloaded("the engine is offloaded: call set_resident(True) before generating")
        self._watch.canary.see(request.prompt_token_ids)
        runs = [SampleRun(request, position, self) for position in range(len(request.seeds))]
        generation = SglangGeneration(request, lambda: self._loop.call(_abort_all(runs)))
        self._runs.update(runs)
        for run in runs:
            self._loop.submit(self._drive(run, generation))
        return generation

    def update_weights(self, message: PushMessage) -> PushReply:
        with self._exclusive:
            try:
                return self._pushes.answer(message)
            except ServerGone as error:
                if not isinstance(message, AROUND_PUSH):
                    raise
                self._replace_server(f"it died before {type(message).__name__}: {error}")
                return self._pushes.answer(message)

    def set_resident(self, resident: bool) -> None:
        with self._exclusive:
            if resident == self._resident:
                return
            if not resident and self._runs:
                raise Offloaded("requests are running: offload the engine when they have finished")
            try:
                self._loop.call(self._client.post(RESUME if resident else RELEASE))
                self._resident = resident
            except ServerGone as error:
                self._resident = resident  # where the next one is brought to
                self._replace_server(f"it died before it was {'resumed' if resident else 'released'}: {error}")
            if self._supervisor is not None:
                self._supervisor.may_restart = resident
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
            speculates=self._watch.speculates,
            num_restarts=0 if self._supervisor is None else self._supervisor.num_replaced,
            num_draft_resends=self._watch.num_resends,
            canary=self._watch.counted,
        )

    def stop(self) -> None:
        """End the server; samples still being generated fail with RuntimeError at their callers."""
        self._stopped.set()
        self._started.close()

    # Starting

    def _make_parts(self) -> None:
        config, settings = self._config, self._config.sglang_server
        self._weights = ServerWeights(
            config,
            self._index,
            (self._target, self._draft),
            self._client,
            self._loop,
            self._replace_server,
            lambda: self._watch.after_push(),
            lambda: self._watch.speculates,
        )
        self._pushes = PushDesk(self._index, self._transport, self._weights)
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
        if self._external is not None or python is None:
            return checked_in()
        return installed_in(python)

    def _open(self, url: str) -> SglangClient:
        key = self._config.sglang.get("api_key")
        client = SglangClient(url, None if key is None else str(key))
        self._loop.call(client.open())
        self._started.callback(lambda: self._loop.call(client.close()))
        return client

    def _launch(self) -> ServerProcess:
        assert self._launcher is not None, "no external server"
        if self._routed is not None:
            self._loop.call(self._routed.withdraw())
        return self._launcher.server(self._watch.speculates)

    def _restore(self) -> None:
        self._weights.restore()
        if not self._resident:  # the trainer has the memory, and SGLang dies of resuming what it has not released
            self._loop.call(self._client.post(RELEASE))
        if self._routed is not None:
            try:
                self._loop.call(self._routed.enter(REENTER_TIMEOUT_S))
            except ConfigError as error:  # the others serve, and this one its own engine where there is no router
                logger.error("the restarted server gets no routed requests reason=%s", error)

    def _enter_router(self) -> None:
        address = self._config.sglang_server.router_addr
        if address is None:
            return
        url = self._client.url if self._launcher is None else self._launcher.reachable_url
        key = self._config.sglang.get("api_key")
        routed = RoutedRequests(self._open(f"http://{address}"), self._client, url, None if key is None else str(key))
        self._loop.call(routed.enter())
        self._routed = routed
        self._started.callback(lambda: self._loop.call(routed.withdraw()))

    def _start_server(self) -> None:
        if self._launcher is None:
            self._loop.call(use_server(self._client, self._config, self._index, self._target))
            return
        settings = self._config.sglang_server
        self._supervisor = Supervisor(
            self._launch,
            self._restore,
            self._client,
            self._loop,
            self._exclusive,
            settings.start_timeout_s,
            settings.max_restarts,
        )
        self._started.callback(self._supervisor.stop)
        try:
            self._supervisor.start()
        except (ServerStartError, NodeLost) as error:
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
            label_suffix(self._config, self._index),
        )

    def _make_transport(self, name: str) -> ServerTransport:
        num_ranks, on_gpu = self._info.num_ranks, self._config.rollout.num_gpus_per_engine > 0
        if name == "disk":
            from rollout.sglang_engine.transports.disk import DiskTransport

            return DiskTransport(self._config.model.hf_checkpoint)
        if name == "distributed":
            from rollout.sglang_engine.transports.distributed import DistributedTransport

            return DistributedTransport(self._own_host(), num_ranks, on_gpu, f"push-{self._index}")
        from rollout.sglang_engine.transports.tensor import TensorTransport, check_torch

        check_torch(self._sglang.torch_version)
        return TensorTransport(num_ranks, on_gpu and torch.cuda.is_available())

    def _own_host(self) -> str:
        """Where the server reaches this process."""
        if self._launcher is not None:
            return self._launcher.reachable_host
        assert self._external is not None, "an engine has a server of its own or another's"
        return LOOPBACK if is_loopback(parse_address(ADDRESSES, self._external)[0]) else self._site.address

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
