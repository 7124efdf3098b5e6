"""SampleRuns holds an engine's samples in progress, and gives each sample its view of the engine."""

from __future__ import annotations

import asyncio

from rollout.sglang_engine.generation import SampleRun, SglangGeneration
from rollout.sglang_engine.kept_server import KeptServer
from rollout.sglang_engine.router import Requests
from rollout.sglang_engine.sample import Reading
from rollout.sglang_engine.weights import ServerWeights
from slime_spec.types import GeneratedSample, GroupRequest


class SampleRuns:
    """Runs the samples of one engine in its asyncio loop; implements Link for them.

    ``fills_rounds`` and ``eos_token_ids`` are as in Reading.
    """

    def __init__(
        self,
        engine_index: int,
        server: KeptServer,
        weights: ServerWeights,
        fills_rounds: bool,
        eos_token_ids: frozenset[int],
    ) -> None:
        self._index, self._server, self._weights = engine_index, server, weights
        self._fills_rounds, self._eos_token_ids = fills_rounds, eos_token_ids
        self.in_progress: set[SampleRun] = set()

    def begin(self, request: GroupRequest) -> SglangGeneration:
        """Start every sample of the group."""
        runs = [SampleRun(request, position, self) for position in range(len(request.seeds))]
        generation = SglangGeneration(request, lambda: self._server.loop.call(_abort_all(runs)))
        self.in_progress.update(runs)
        for run in runs:
            self._server.loop.submit(self._drive(run, generation))
        return generation

    @property
    def requests(self) -> Requests:
        return self._server.requests

    @property
    def reading(self) -> Reading:
        num_steps = self._server.info.num_steps if self._server.speculates else 0
        return Reading(self._index, num_steps, self._fills_rounds, self._eos_token_ids)

    @property
    def weights_key(self) -> str:
        return self._weights.cache_key

    @property
    def draft_version(self) -> int | None:
        return self._weights.draft_version

    async def until_ready(self) -> None:
        await self._server.until_ready()

    def suspect(self) -> None:
        self._server.suspect()

    async def _drive(self, run: SampleRun, generation: SglangGeneration) -> None:
        try:
            arrived: GeneratedSample | BaseException = await run.run()
        except asyncio.CancelledError:
            generation.deliver(RuntimeError("the engine stopped before the group was finished"))
            raise
        except Exception as error:  # noqa: BLE001 - handed to the caller, who raises it
            arrived = error
        finally:
            self.in_progress.discard(run)
        generation.deliver(arrived)


async def _abort_all(runs: list[SampleRun]) -> None:
    await asyncio.gather(*(run.abort() for run in runs))
