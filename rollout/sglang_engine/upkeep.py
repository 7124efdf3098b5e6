"""Upkeep acts on what a push, an offload and the canary report: it replaces the server, mends or disables its draft.

PushDesk ─ commit ─► ServerWeights.send ─ Outcome ─► replace the server? ─► confirm ─► DraftWatch ─ Verdict ─► act
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from rollout.sglang_engine.direct import DirectStaging
from rollout.sglang_engine.draft_watch import DraftWatch, Verdict
from rollout.sglang_engine.kept_server import KeptServer
from rollout.sglang_engine.staging import ServerStaging
from rollout.sglang_engine.weights import ServerWeights
from slime_spec.errors import PushError
from slime_spec.types import SpecCounters
from slime_spec.weights.messages import Manifest, PauseMode, Side
from slime_spec.weights.receive import PushStage

logger = logging.getLogger(__name__)


class Upkeep:
    """Implements ServingWeights for the engine's PushDesk: calls ServerWeights and acts on the outcomes.

    ``counted`` is what the canary after the last push counted; ``num_resends`` is how often the draft was mended.
    ``after_push`` is called when the server generates again after a push and has been looked at. Used by one thread at
    a time.
    """

    def __init__(
        self,
        server: KeptServer,
        weights: ServerWeights,
        watch: DraftWatch,
        after_push: Callable[[], None] = lambda: None,
    ) -> None:
        self._server, self._weights, self._watch, self._after_push = server, weights, watch, after_push
        self._is_changed = False  # by a push, since the draft was last looked at
        self.counted = SpecCounters()
        self.num_resends = 0

    def version(self, side: Side) -> int:
        return self._weights.version(side)

    def staging(self, manifest: Manifest) -> ServerStaging | DirectStaging:
        return self._weights.staging(manifest, lambda why: self._server.surviving(lambda: None, why))

    def pause(self, mode: PauseMode) -> None:
        self._weights.pause(mode)

    def resume(self) -> None:
        self._weights.resume()
        self._look_after_push()

    def commit(self, stage: PushStage[ServerStaging | DirectStaging]) -> None:
        """Send the server the push; a server that dies of it is replaced, then gets it; raises PushError on refusal."""
        outcome = self._weights.send(stage)
        if outcome.refusal is not None:
            self._server.surviving(lambda: None, outcome.loss)
            raise outcome.refusal
        self._server.surviving(lambda: self._weights.confirm(stage), outcome.loss)
        self._is_changed = True
        if not self._weights.is_paused:
            self._look_after_push()

    def checksum(self, side: Side) -> str:
        return self._weights.checksum(side)

    def after_offload(self) -> None:
        """Check that the draft is intact: SGLang has lost drafts over a release and resume of memory."""
        if self._server.speculates and self._watch.has_weights:
            self._server.surviving(lambda: self._check_sums("the draft did not survive the offload"))

    def _look_after_push(self) -> None:
        """Compare checksums and run the canary, once the server generates again."""
        if not self._is_changed:
            return
        self._is_changed = False
        self.counted = SpecCounters()
        if self._server.speculates:
            self._look_at_draft()
        self._after_push()

    def _look_at_draft(self) -> None:
        if self._watch.has_weights:
            self._server.surviving(lambda: self._check_sums("the draft was changed, and not by a push of it"))
        if self._watch.canary.prompts:
            self._server.surviving(self._check_canary)

    def _check_sums(self, alarm: str) -> None:
        verdict = self._watch.judge_sums(self._weights.draft_is_as_remembered(), self._weights.has_pushed_draft)
        if verdict is not Verdict.FINE:
            logger.error("ALARM %s", alarm)
            self._act(verdict)

    def _check_canary(self) -> None:
        verdict = self._canary_verdict(is_mended=False)
        if verdict in (Verdict.RESEND, Verdict.RESTART):
            self._act(verdict)
            verdict = self._canary_verdict(is_mended=True)
            if verdict is Verdict.FINE and self.counted.num_rounds:
                logger.warning("the draft is accepted again")
        if verdict is Verdict.DISABLE:
            self._act(verdict)

    def _canary_verdict(self, is_mended: bool) -> Verdict:
        counted = self._server.loop.call(self._watch.canary.run(self._server.client, self._server.answers))
        self.counted = counted or SpecCounters()
        return self._watch.judge_canary(
            counted, self._weights.has_pushed_draft, self._weights.knows_draft_sums, is_mended
        )

    def _act(self, verdict: Verdict) -> None:
        if verdict is Verdict.DISABLE:
            logger.error("ALARM speculation is disabled: drafts are refused, and the draft is the one that was pushed")
            self._server.speculates = False
            self._server.speculates = not self._replace("speculation is disabled")
            return
        self.num_resends += 1
        if verdict is Verdict.RESEND:
            self._weights.send_draft_again()
        else:
            self._replace("the draft is lost, and only its folder has it")
        self._weights.remember_draft()

    def _replace(self, why: str) -> bool:
        """Replace the server; False for an external server, whose owner reads the log."""
        try:
            self._server.replace(why)
        except PushError as error:
            logger.error("ALARM %s", error)
            return False
        return True
