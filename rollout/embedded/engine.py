"""The embedded engine behind the RolloutEngine seam: requests, pushes, residency."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from threading import Lock
from time import perf_counter

import psutil
import torch

from rollout.embedded.assemble import Assembly
from rollout.embedded.core import GenerationCore
from rollout.embedded.generation import EmbeddedGeneration
from rollout.embedded.loop_thread import LoopThread, Refused
from rollout.embedded.model import Decoder
from rollout.embedded.push import PushStage
from rollout.embedded.validate import check_request
from rollout.embedded.weights import decoder_checksum
from slime_spec.config.tree import Config
from slime_spec.errors import PushError
from slime_spec.interfaces import Generation, WeightTransport
from slime_spec.memory import release_freed_memory
from slime_spec.types import EngineStats, GeneratedSample, GroupRequest
from slime_spec.weights.push import (
    BeginPush,
    CancelPush,
    CommitPush,
    PreparePush,
    PushBucket,
    PushMessage,
    PushReply,
    VerifyPush,
)


class EmbeddedEngine:
    """A RolloutEngine in this process, on the CPU or on one GPU.

    Requests go on over a commit: their next rounds use the new weights, and their ``weight_version`` stays that of
    their prefill, the oldest that shaped them. How many cores a pass uses is the process's choice
    (``torch.set_num_threads``), not the engine's.

    Example::

        engine = EmbeddedEngine(config, engine_index=0, transport=transport)
        engine.start()
        for sample in engine.generate(request):
            ...
        engine.stop()
    """

    _core: GenerationCore
    _thread: LoopThread

    def __init__(
        self,
        config: Config,
        engine_index: int,
        transport: WeightTransport,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._assembly = Assembly(config)
        self._index, self._transport, self._clock = engine_index, transport, clock
        self._resident = True
        self._push: PushStage | None = None
        self._live: set[EmbeddedGeneration] = set()
        # Orders requests against offloading: a request is either queued before it or refused after it.
        self._gate = Lock()
        self._started = ExitStack()

    def start(self) -> None:
        self._core = self._assembly.core(self._index, self._clock)
        self._thread = LoopThread(self._core, self._fail_all)
        self._started.callback(self._thread.stop)

    def generate(self, request: GroupRequest) -> Generation:
        check_request(request, self._assembly.limits)
        if request.params.stop:
            self._assembly.load_tokenizer()
        generation = EmbeddedGeneration(len(request.seeds), lambda: self._abort(generation))
        with self._gate:
            if not self._resident:
                raise Refused("the engine is offloaded: call set_resident(True) before generating")
            self._live.add(generation)
            generation.group = self._thread.submit(
                lambda: self._core.add(request, lambda sample: self._deliver(generation, sample))
            )
        return generation

    def update_weights(self, message: PushMessage) -> PushReply:
        """See RolloutEngine; buckets are packed on the caller's thread while the loop's goes on serving."""
        stage, self._push = self._push, None  # whatever fails below drops the push
        match message:
            case BeginPush(manifest):
                builder = self._assembly.builder(self._core.decoder.embedding.device)
                stage = PushStage(manifest, self._assembly.spec, builder)
            case PushBucket() if stage is not None:
                stage.take(message, self._transport)
            case PreparePush(version, checksum) if stage is not None:
                stage.prepare(version, checksum)
            case CommitPush(version) if stage is not None and stage.decoder is not None and stage.version == version:
                decoder = stage.decoder
                self._thread.call(lambda: self._swap(decoder, version))
                return PushReply(self._index, self._core.version, stage.checksum)
            case VerifyPush():
                return PushReply(self._index, self._core.version, self.weights_checksum())
            case CancelPush():
                return PushReply(self._index, self._core.version, "")
            case _:
                raise PushError(f"{type(message).__name__} of version {message.version} outside a push")
        self._push = stage
        return PushReply(self._index, self._core.version, stage.checksum)

    def set_resident(self, resident: bool) -> None:
        with self._gate:
            self._thread.call(lambda: self._set_resident(resident))

    def stats(self) -> EngineStats:
        core, limits = self._core, self._assembly.limits
        return EngineStats(
            weight_version=core.version,
            num_running=len(core.batch.sequences),
            num_waiting=core.num_waiting,
            kv_tokens_used=core.batch.kv_tokens_used,
            kv_tokens_capacity=limits.max_total_tokens,
            resident=self._resident,
            rss_bytes=psutil.Process().memory_info().rss,
            time_in_forward_s=core.timing.forward_s,
            time_total_s=core.timing.total_s,
        )

    def weights_checksum(self) -> str:
        """Combined checksum of the weights the engine computes with, read back out of their packed form."""
        return self._thread.call(lambda: decoder_checksum(self._core.decoder))

    def stop(self) -> None:
        """End the loop; samples still being generated fail with RuntimeError at their callers."""
        self._started.close()

    def _swap(self, decoder: Decoder, version: int) -> None:
        self._core.decoder, self._core.version = decoder, version

    def _set_resident(self, resident: bool) -> None:
        if self._core.has_work:
            raise Refused("requests are running: offload the engine when they have finished")
        if self._assembly.device.type == "cuda":
            self._core.decoder.move(self._assembly.device if resident else torch.device("cpu"))
        if not resident:
            self._core.cache.release()
            release_freed_memory()
        self._resident = resident

    def _deliver(self, generation: EmbeddedGeneration, sample: GeneratedSample) -> None:
        if generation.deliver(sample):
            self._live.discard(generation)

    def _abort(self, generation: EmbeddedGeneration) -> None:
        # Commands run in order, so the group has been added by then.
        self._thread.submit(lambda: self._core.abort(generation.group.result()))

    def _fail_all(self, error: BaseException) -> None:
        for generation in list(self._live):
            generation.fail(error)
