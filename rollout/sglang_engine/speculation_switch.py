"""SpeculationSwitch lets the requests of an SGLang engine draft where that pays, by what their streams measure.

    streams ─► RoundMeter ─► running batches ─┐
    samples ─► rounds and tokens ─────────────┤ after each push: measure a batch, decide ─► the next rollout's requests
    measurements (with and without, in turns) ┘

It works where requests can opt out of speculation (speculation_control.py). Elsewhere it says once what decides, and
nothing is estimated: what a rollout without drafts would have taken cannot be known there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from time import perf_counter
from typing import Any

from rollout.sglang_engine.canary import Canary, NoAnswer
from rollout.sglang_engine.client import ServerGone, ServerRefused
from rollout.sglang_engine.kept_server import KeptServer
from rollout.sglang_engine.round_meter import RoundMeter
from rollout.sglang_engine.speculation_trial import Measurement, find_switch, measure
from slime_spec.sglang.speculation_control import RequestSwitch, SpeculationControl, decides_by_batch
from slime_spec.speculation.net_benefit import NetBenefit
from slime_spec.speculation.rollout_switch import BatchUse, RolloutSwitch
from slime_spec.types import GeneratedSample, GroupRequest

logger = logging.getLogger(__name__)

Measure = Callable[..., Coroutine[Any, Any, Measurement]]
SHAPING = ("temperature", "top_p", "top_k", "min_p")  # of a request, what acceptance depends on


class SpeculationSwitch:
    """Owns the meter and the policy of one engine's server; ``canary`` has the prompts that measurements use.

    ``benefit`` is what all rollouts took and would have taken without drafts, as far as that is known. Streams are
    noted in the engine's asyncio loop, everything else comes from one thread at a time. ``measure`` runs a batch with
    drafts and without.
    """

    def __init__(self, server: KeptServer, canary: Canary, measure: Measure = measure) -> None:
        self._server, self._canary, self.measure = server, canary, measure
        self.meter = RoundMeter()
        self.control: SpeculationControl | None = None
        self.benefit = NetBenefit()
        self._policy: RolloutSwitch | None = None
        self._sampling: dict[str, Any] = {}
        self._num_tokens = self._num_rounds = 0
        self._is_mixed = False  # the rollout has samples that began before the last change

    @property
    def off_switch(self) -> RequestSwitch | None:
        """Return the field that the requests which begin now send in order not to draft; None: they draft."""
        if self.control is None or self._policy is None or self._policy.speculates:
            return None
        return self.control.switch

    @property
    def pays_up_to(self) -> int | None:
        """Return the largest measured batch at which drafts pay; see EngineStats."""
        return None if self._policy is None else self._policy.pays_up_to

    def saw(self, request: GroupRequest) -> None:
        """Note what requests ask for: measurements ask for the same."""
        self._sampling = {name: getattr(request.params, name) for name in SHAPING}

    def finished(self, sample: GeneratedSample) -> None:
        """Count the rounds of a finished sample, and the tokens that they brought."""
        if sample.spec.num_rounds:
            self._num_tokens += len(sample.token_ids) - 1 - sample.spec.num_off_steps
            self._num_rounds += sample.spec.num_rounds

    def after_push(self, is_idle: bool) -> None:
        """Decide about the next rollout from the last; measure before that where nothing runs and it is worth it."""
        server = self._server
        uses, num_tokens, num_rounds = server.loop.call(self._take())
        if not server.speculates or not server.info.num_steps or server.requests is not server.client:
            return  # nothing to switch; or a router, whose other servers do not do what this server does
        try:
            if self.control is None and self._canary.prompts and is_idle:
                self._find_control()
            if self.control is None or self.control.switch is None:
                return
            self._policy = self._policy or RolloutSwitch(server.info.num_steps)
            self._policy.accept_length.observe(num_tokens, num_rounds)
            self._decide(self._policy, self.control.switch, uses, is_idle)
        except (ServerGone, ServerRefused, NoAnswer, TimeoutError) as error:
            logger.warning(
                "whether drafts pay was not measured after this push reason=%s", error or "no answer in time"
            )
            if isinstance(error, ServerGone | TimeoutError):
                server.suspect()

    def hold(self) -> None:
        """Leave the time of a pause out of what is measured."""

        async def hold() -> None:
            self.meter.hold()

        self._server.loop.call(hold())

    async def _take(self) -> tuple[tuple[BatchUse, ...], int, int]:
        taken = self.meter.take(), self._num_tokens, self._num_rounds
        self._num_tokens = self._num_rounds = 0
        return taken

    def _find_control(self) -> None:
        server = self._server
        switch = server.loop.call(find_switch(server.client, self._canary.prompts[0], server.info.version))
        self.control = SpeculationControl(switch, decides_by_batch(server.info))
        logger.info(
            "speculation control level=%s version=%s: %s", self.control.level, server.info.version, self.control.told
        )

    def _decide(self, policy: RolloutSwitch, switch: RequestSwitch, uses: tuple[BatchUse, ...], is_idle: bool) -> None:
        drafted, is_mixed = policy.speculates, self._is_mixed
        self._is_mixed = False
        if not uses or is_mixed:
            self._is_mixed = is_mixed and not is_idle
            return
        size = policy.batch_to_measure(uses, drafted)
        if is_idle and size is not None:
            self._measure(policy, switch, size, learns_acceptance=not drafted)
        self.benefit = self.benefit.plus(policy.benefit(uses, drafted))
        gain = policy.decide(uses, drafted)
        if policy.speculates is not drafted and gain is not None:
            self._is_mixed = not is_idle
            word = "on" if policy.speculates else "off"
            logger.info("speculation is %s from this push gain=%.3f error=%.3f", word, gain.value, gain.relative_error)

    def _measure(self, policy: RolloutSwitch, switch: RequestSwitch, size: int, learns_acceptance: bool) -> None:
        start, canary = perf_counter(), self._canary
        measuring = self.measure(self._server.client, canary.prompts, self._sampling, canary.num_tokens, size, switch)
        measured: Measurement = self._server.loop.call(measuring)
        for ratio in measured.break_even:
            policy.break_even.observe(size, ratio)
        if learns_acceptance:
            policy.accept_length.observe(measured.num_counted, measured.num_rounds)
        seconds = perf_counter() - start
        policy.note_measurement(size, seconds)
        logger.info(
            "drafting measured in turns sequences=%d break_even=%s accept_len=%.3f seconds=%.2f",
            size,
            ",".join(f"{ratio:.3f}" for ratio in measured.break_even),
            measured.num_counted / measured.num_rounds,
            seconds,
        )
