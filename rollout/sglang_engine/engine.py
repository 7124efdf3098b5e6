"""SglangEngine implements RolloutEngine with one real server, its requests and its weights."""

from __future__ import annotations

import psutil
import torch

from rollout.sglang_engine.adoption import Adoption
from rollout.sglang_engine.assemble import make_corpus, make_delivery, make_direct, make_experts_reader, make_watch
from rollout.sglang_engine.client import SglangClient
from rollout.sglang_engine.generation import SglangGeneration
from rollout.sglang_engine.kept_server import KeptServer
from rollout.sglang_engine.limits import limits_of
from rollout.sglang_engine.sample import Reading
from rollout.sglang_engine.sample_runs import SampleRuns
from rollout.sglang_engine.speculation_switch import SpeculationSwitch
from rollout.sglang_engine.upkeep import Upkeep
from rollout.sglang_engine.weights import ServerWeights
from slime_spec.checkpoints.end_of_text import end_token_ids
from slime_spec.checkpoints.model_files import TargetFiles, draft_files
from slime_spec.config.tree import Config
from slime_spec.interfaces import WeightTransport
from slime_spec.preflight.requests import check_request
from slime_spec.sglang.arguments import config_of_engine
from slime_spec.site import HERE, Site
from slime_spec.types import EngineStats, GroupRequest
from slime_spec.weights.messages import ContinueGeneration, PauseGeneration, PushMessage, PushReply, VerifyPush
from slime_spec.weights.receive import PushDesk

# Sent again to a server that replaces a dead server: none of these messages changes what a push has staged.
AROUND_PUSH = (PauseGeneration, ContinueGeneration, VerifyPush)


class Offloaded(RuntimeError):
    """A request came while the engine's memory is released, or its release while requests run."""


class SglangEngine:
    """Implements RolloutEngine and MayStopServing with a server process of its own, or with an external server.

    The server's weights change only while it is paused; a sample across a push says so in its version spans. ``site``
    says where the engine is, and what other nodes it has.

        generate ──────► SampleRuns ──┐
        update_weights ► PushDesk ─ Upkeep ─ ServerWeights ─ Delivery ──► KeptServer ─► the server
        set_resident ─────────────────┘

    Example::

        engine = SglangEngine(config, engine_index=0, transport=transport)
        engine.start()
        for sample in engine.generate(request):
            ...
        engine.stop()
    """

    def __init__(self, config: Config, engine_index: int, transport: WeightTransport, site: Site = HERE) -> None:
        self.config = config = config_of_engine(config, engine_index)
        self._index = engine_index
        self._target = TargetFiles.read(config.model.hf_checkpoint)
        ends = end_token_ids(config.model.hf_checkpoint)
        self._limits = limits_of(config, self._target, ends)
        self._draft = draft_files(config, self._target)
        self.server = KeptServer(config, engine_index, self._target, site)
        self.weights = ServerWeights(config, engine_index, (self._target, self._draft), self.server, site.run)
        self._watch = make_watch(config, self._target, self._draft)
        self._transport = transport
        self._speculation = SpeculationSwitch(self.server, self._watch.canary)
        self._upkeep = Upkeep(self.server, self.weights, self._watch, self._after_push)
        self._pushes = PushDesk(engine_index, transport, self._upkeep, getattr(torch, config.engine.dtype))
        fills_rounds = config.speculative.record.fills_rounds
        experts = make_experts_reader(config)
        reading = Reading(engine_index, 0, fills_rounds, self._target.vocab_size, ends, experts=experts)
        corpus = make_corpus(config, self.server)
        self.samples = SampleRuns(self.server, self.weights, reading, self._speculation, corpus)

    @property
    def client(self) -> SglangClient:
        """Return the client of the engine's own server."""
        return self.server.client

    def start(self) -> None:
        self.start_apart()
        try:
            self.server.enter_router()
        except BaseException:
            self.stop()
            raise

    def serve(self) -> None:
        self.server.enter_router(in_place_of_dead=True)

    def start_apart(self) -> None:
        try:
            self.server.start(self.weights.restore)
            self.weights.delivery = make_delivery(self.config, self._index, self._draft, self.server)
            self.weights.direct = make_direct(self._transport, self._index, self.weights.delivery, self.server)
            if self.server.is_external:
                Adoption(self.config, self._index, self._target, self.server, self.weights).run()
            if self._draft is not None:
                self.weights.remember_draft()
        except BaseException:
            self.stop()
            raise

    def generate(self, request: GroupRequest) -> SglangGeneration:
        check_request(request, self._limits)
        if not self.server.resident:
            raise Offloaded("the engine is offloaded: call set_resident(True) before generating")
        self._watch.canary.see(request.prompt_token_ids)
        self._speculation.saw(request)
        return self.samples.begin(request)

    def update_weights(self, message: PushMessage) -> PushReply:
        if isinstance(message, PauseGeneration) and message.mode == "abort":
            self.samples.expect_aborts()
        if isinstance(message, PauseGeneration):
            self._speculation.hold()
        with self.server.exclusive:
            if not isinstance(message, AROUND_PUSH):
                return self._pushes.answer(message)
            return self.server.surviving(lambda: self._pushes.answer(message))

    def set_resident(self, resident: bool) -> None:
        with self.server.exclusive:
            if resident == self.server.resident:
                return
            if not resident and self.samples.in_progress:
                raise Offloaded("requests are running: offload the engine when they have finished")
            self.server.set_resident(resident)
            if resident:
                self._upkeep.after_offload()

    def stats(self) -> EngineStats:
        load = self.server.load()
        return EngineStats(
            weight_version=self.weights.version("target"),
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            kv_tokens_used=load.num_used_tokens,
            kv_tokens_capacity=self.server.info.max_total_tokens,
            resident=self.server.resident,
            rss_bytes=psutil.Process().memory_info().rss,
            draft_version=self.weights.version("draft"),
            speculates=self.server.speculates,
            num_restarts=self.server.num_replaced,
            num_draft_resends=self._upkeep.num_resends,
            num_interruptions=self.samples.num_interruptions,
            canary=self._upkeep.counted,
            benefit=self._speculation.benefit,
            pays_up_to=self._speculation.pays_up_to,
        )

    def _after_push(self) -> None:
        self._speculation.after_push(is_idle=not self.samples.in_progress)

    def wait_serving(self, known: bool) -> bool:
        return self.server.wait_serving(known)

    def stop(self) -> None:
        """End the server; samples still being generated fail with RuntimeError at their callers."""
        self.server.stop()
