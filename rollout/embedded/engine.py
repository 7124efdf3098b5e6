"""The embedded engine implements RolloutEngine: requests, pushes and residency."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from threading import Lock
from time import perf_counter, thread_time

import psutil
import torch

from rollout.embedded.assemble import Assembly, share_target
from rollout.embedded.calibrate import calibrate, costs_of
from rollout.embedded.core import GenerationCore
from rollout.embedded.drafting import LearningDrafter
from rollout.embedded.generation import EmbeddedGeneration
from rollout.embedded.logprobs import LogprobRecord
from rollout.embedded.loop_thread import LoopThread, Refused
from rollout.embedded.push import CoreStaging, CoreWeights
from rollout.embedded.request import Group, OnProgress
from slime_spec.config.tree import Config
from slime_spec.errors import GenerationError
from slime_spec.interfaces import Generation, WeightTransport
from slime_spec.memory import release_freed_memory
from slime_spec.preflight.requests import RequestLimits, check_request
from slime_spec.site import HERE, Site
from slime_spec.speculation.cost_table import CostTable
from slime_spec.types import EarlierReply, EngineStats, GeneratedSample, GroupRequest
from slime_spec.weights.checksums import combined_checksum
from slime_spec.weights.messages import PushMessage, PushReply, Side
from slime_spec.weights.receive import PushDesk


class EmbeddedEngine:
    """Implements RolloutEngine in this process, on the CPU or on one GPU.

    Unless the push pauses it, generating goes on over a commit: the next rounds use the new weights, and a sample's
    ``weight_version`` is the oldest that shaped it. How many cores a pass uses is the process's choice
    (``torch.set_num_threads``), not the engine's.

    Example::

        engine = EmbeddedEngine(config, engine_index=0, transport=transport)
        engine.start()
        for sample in engine.generate(request):
            ...
        engine.stop()
    """

    _core: GenerationCore
    _costs: CostTable | None
    _thread: LoopThread
    _weights: CoreWeights
    _pushes: PushDesk[CoreStaging]

    def __init__(
        self,
        config: Config,
        engine_index: int,
        transport: WeightTransport,
        site: Site = HERE,  # this process's own: it reaches for nothing outside
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._assembly = Assembly(config)
        self._index, self._transport, self._clock = engine_index, transport, clock
        self._resident = True
        self._live: set[EmbeddedGeneration] = set()
        # Orders requests against offloading: a request is either queued before it or refused after it.
        self._gate = Lock()
        self._started = ExitStack()

    def start(self) -> None:
        # On a CPU what rounds cost is this thread's own time: what others run beside it says nothing of a round.
        cost_clock = thread_time if self._assembly.device.type == "cpu" else self._clock
        self._core = self._assembly.core(self._index, self._clock, cost_clock=cost_clock)
        calibrate(self._core)
        self._costs = costs_of(self._core)
        self._thread = LoopThread(self._core, self._fail_all)
        self._weights = CoreWeights(self._assembly, self._core, self._thread)
        self._pushes = PushDesk(self._index, self._transport, self._weights, self._assembly.dtype)
        self._started.callback(self._thread.stop)

    def generate(
        self, request: GroupRequest, on_progress: OnProgress | None = None, record: LogprobRecord | None = None
    ) -> Generation:
        """See RolloutEngine; the engine's thread calls ``on_progress`` with what each round adds: it must not block.

        ``record`` gathers logprobs that samples do not have: they are there when ``on_progress``, or a sample, is.
        """
        check_request(request, self._assembly.limits)
        if request.params.stop:
            self._assembly.load_tokenizer()
        generation = EmbeddedGeneration(
            len(request.seeds), lambda: self._abort(generation), lambda replies: self._learn(generation, replies)
        )
        with self._gate:
            if not self._resident:
                raise Refused("the engine is offloaded: call set_resident(True) before generating")
            self._live.add(generation)
            generation.group = self._thread.submit(
                lambda: self._core.add(
                    request,
                    lambda sample: self._deliver(generation, sample),
                    on_progress,
                    lambda error: self._give_up(generation, error),
                    record,
                )
            )
        return generation

    def share_target(self, first: EmbeddedEngine) -> None:
        """Compute with the other's copy of the same target, so that a comparison of both is fair; see assemble."""
        self._thread.call(lambda: share_target(self._core, first._core))

    def update_weights(self, message: PushMessage) -> PushReply:
        """See RolloutEngine; buckets are packed on the caller's thread while the loop's goes on serving."""
        return self._pushes.answer(message)

    def set_resident(self, resident: bool) -> None:
        with self._gate:
            self._thread.call(lambda: self._set_resident(resident))

    def stats(self) -> EngineStats:
        core, limits = self._core, self._assembly.limits
        return EngineStats(
            weight_version=core.version,
            num_running=len(core.batch.sequences),
            num_waiting=len(core.waiting),
            kv_tokens_used=core.batch.kv_tokens_used,
            kv_tokens_capacity=limits.max_total_tokens,
            resident=self._resident,
            rss_bytes=psutil.Process().memory_info().rss,
            time_in_forward_s=core.timing.forward_s,
            time_total_s=core.timing.total_s,
            time_in_draft_s=core.timing.draft_s,
            draft_version=core.draft_version,
            num_preemptions=core.num_preemptions,
            speculates=self._assembly.config.speculative.record.speculates,
            benefit=core.speculation.benefit,
            pays_up_to=core.speculation.pays_up_to,
            costs=self._costs,
            draft_temperature=core.speculation.draft_temperature,
        )

    @property
    def limits(self) -> RequestLimits:
        """Return what one request may ask for; known before ``start``."""
        return self._assembly.limits

    @property
    def weight_version(self) -> int:
        return self._core.version

    @property
    def draft_version(self) -> int:
        return self._core.draft_version

    @property
    def draft_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the names and shapes of a push of side "draft"; none where the drafter has no weights."""
        weights = self._core.drafter.weights
        return {} if weights is None else weights.shapes

    def tensor_checksums(self, side: Side) -> dict[str, int]:
        """Return the checksum of every tensor the engine computes with, read back out of its packed form."""
        return self._weights.tensor_checksums(side)

    def weights_checksum(self, side: Side = "target") -> str:
        """Return the checksum of all tensors, combined as a push combines its own."""
        return combined_checksum(self.tensor_checksums(side).items())

    def ping(self) -> None:
        """Return once the loop has come round; raises RuntimeError when it has ended."""
        self._thread.call(lambda: None)

    def stop(self) -> None:
        """End the loop; samples still being generated fail with RuntimeError at their callers."""
        self._started.close()

    def _set_resident(self, resident: bool) -> None:
        if self._core.has_work:
            raise Refused("requests are running: offload the engine when they have finished")
        if self._assembly.device.type == "cuda":
            self._core.move(self._assembly.device if resident else torch.device("cpu"))
        if not resident:
            self._core.release_kv()
            release_freed_memory()
        self._resident = resident

    def _deliver(self, generation: EmbeddedGeneration, sample: GeneratedSample) -> None:
        if generation.deliver(sample):
            self._live.discard(generation)

    def _give_up(self, generation: EmbeddedGeneration, error: GenerationError) -> None:
        self._live.discard(generation)
        generation.fail(error)

    def _abort(self, generation: EmbeddedGeneration) -> None:
        # Commands run in order, so the group has been added by then.
        self._thread.submit(lambda: self._core.abort(generation.group.result()))

    def _learn(self, generation: EmbeddedGeneration, replies: Sequence[EarlierReply]) -> None:
        self._thread.submit(lambda: self._show(generation.group.result(), replies))

    def _show(self, group: Group, replies: Sequence[EarlierReply]) -> None:
        """Show replies to a drafter that learns; a group that has ended meanwhile leaves nothing behind."""
        core, prompt = self._core, group.request.prompt_token_ids
        drafter, start = core.drafter, self._clock()
        if not (group.num_unfinished and isinstance(drafter, LearningDrafter) and core.speculation.applies_to(group)):
            return
        for reply in replies:
            drafter.finished(group.key, (*prompt, *reply.token_ids), len(prompt))
        seconds = self._clock() - start
        core.timing.draft_s += seconds
        core.timing.total_s += seconds

    def _fail_all(self, error: BaseException) -> None:
        for generation in list(self._live):
            generation.fail(error)
