"""SampleRuns holds an engine's samples in progress, and gives each sample its view of the engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace

from rollout.sglang_engine.client import ServerRefused
from rollout.sglang_engine.generation import BUSY, Interruption, SampleRun, SglangGeneration
from rollout.sglang_engine.kept_server import KeptServer
from rollout.sglang_engine.reply_corpus import ReplyCorpus
from rollout.sglang_engine.router import Requests
from rollout.sglang_engine.sample import Reading
from rollout.sglang_engine.speculation_switch import SpeculationSwitch
from rollout.sglang_engine.weights import ServerWeights
from slime_spec.types import EarlierReply, GeneratedSample, GroupRequest

logger = logging.getLogger(__name__)

WATCH_S = 0.5


class SampleRuns:
    """Runs the samples of one engine in its asyncio loop; implements Link for them.

    ``reading`` has what does not change while the engine runs; ``num_interruptions`` counts parts that ended before
    their responses. ``corpus`` is None for a server that is not fed with replies.
    """

    def __init__(
        self,
        server: KeptServer,
        weights: ServerWeights,
        reading: Reading,
        speculation: SpeculationSwitch,
        corpus: ReplyCorpus | None,
    ) -> None:
        self._server, self._weights, self._reading = server, weights, reading
        self._speculation, self.corpus = speculation, corpus
        self.in_progress: set[SampleRun] = set()
        self.num_interruptions = 0
        self._watching = False

    def begin(self, request: GroupRequest) -> SglangGeneration:
        """Start every sample of the group."""
        runs = [SampleRun(request, position, self) for position in range(len(request.seeds))]
        generation = SglangGeneration(
            request,
            lambda: self._server.loop.call(_abort_all(runs)),
            lambda replies: self._learn(generation, replies),
        )
        self.in_progress.update(runs)
        if self.corpus is not None:
            self._server.loop.submit(self.corpus.begin(generation, request))
        for run in runs:
            self._server.loop.submit(self._drive(run, generation))
        if self._server.supervisor is None:
            self._server.loop.submit(self._watch())
        return generation

    def _learn(self, generation: SglangGeneration, replies: Sequence[EarlierReply]) -> None:
        if self.corpus is not None:
            self._server.loop.submit(self.corpus.learn(generation, replies))

    async def _watch(self) -> None:
        """End the parts on an external server that hangs, which nobody here can replace."""
        if self._watching:
            return
        self._watching = True
        url, timeout_s = self._server.client.url, self._server.signs.limit_s
        while self.in_progress:
            await asyncio.sleep(min(timeout_s, WATCH_S))
            if not self._server.signs.is_silent or await self._server.answers():
                continue
            for run in list(self.in_progress):
                run.lose(f"{url} does not answer within {timeout_s:g} s (--sglang-stall-timeout)")
        self._watching = False

    def expect_aborts(self) -> None:
        """Let all samples in progress end with what they have, because a pause aborts them."""

        async def expect() -> None:
            for run in list(self.in_progress):
                run.expect_abort()

        self._server.loop.call(expect())

    @property
    def requests(self) -> Requests:
        return self._server.requests

    @property
    def reading(self) -> Reading:
        if not self._server.speculates:
            return replace(self._reading, num_steps=0)
        off_switch = self._speculation.off_switch
        return replace(self._reading, num_steps=self._server.info.num_steps, off_switch=off_switch)

    @property
    def weights_key(self) -> str:
        return self._weights.cache_key

    @property
    def draft_version(self) -> int | None:
        return self._weights.draft_version

    async def until_ready(self) -> None:
        await self._server.until_ready()

    def opened(self, stream: str) -> None:
        if self._server.requests is self._server.client:  # behind a router it may be another engine's server
            self._server.signs.opened(stream)

    def heard(self, stream: str) -> None:
        self._server.signs.heard(stream)

    def brought(self, stream: str, num_tokens: int) -> None:
        self._speculation.meter.brought(stream, num_tokens)

    def closed(self, stream: str) -> None:
        self._server.signs.closed(stream)
        self._speculation.meter.closed(stream)

    def suspect(self) -> None:
        self._server.suspect()

    def interrupted(self, reason: Interruption) -> None:
        self.num_interruptions += 1
        if self.num_interruptions.bit_count() == 1:  # 1, 2, 4, ...: a full queue refuses hundreds
            logger.warning("samples were interrupted num=%d last_reason=%s", self.num_interruptions, reason)
        if not isinstance(reason, ServerRefused) or reason.status not in BUSY:
            self.suspect()

    async def _drive(self, run: SampleRun, generation: SglangGeneration) -> None:
        try:
            sample = await run.run()
            self._speculation.finished(sample)
            arrived: GeneratedSample | BaseException = sample
        except asyncio.CancelledError:
            generation.deliver(RuntimeError("the engine stopped before the group was finished"))
            raise
        except Exception as error:  # noqa: BLE001 - handed to the caller, who raises it
            arrived = error
        finally:
            self.in_progress.discard(run)
            if self.corpus is not None:
                self.corpus.ended(generation)
        generation.deliver(arrived)


async def _abort_all(runs: list[SampleRun]) -> None:
    await asyncio.gather(*(run.abort() for run in runs))
