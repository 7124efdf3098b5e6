"""Sees that the draft is still there, mends it, and gives speculation up, loudly, where it cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable

from rollout.sglang_engine.canary import Canary
from rollout.sglang_engine.client import ServerGone, SglangClient
from rollout.sglang_engine.loop_thread import AsyncLoop
from rollout.sglang_engine.weights import ServerWeights
from slime_spec.errors import PushError
from slime_spec.types import SpecCounters

logger = logging.getLogger(__name__)


class DraftWatch:
    """``has_weights``: the drafter has weights that can be lost. ``speculates`` turns false when all else failed.

    ``counted`` is what the last canary counted since the last push; ``num_resends`` how often the draft was mended.
    """

    def __init__(
        self,
        canary: Canary,
        weights: ServerWeights,
        client: SglangClient,
        loop: AsyncLoop,
        replace_server: Callable[[str], None],
        speculates: bool,
        has_weights: bool,
    ) -> None:
        self.canary = canary
        self._weights, self._client, self._loop = weights, client, loop
        self._replace_server, self._has_weights = replace_server, has_weights
        self.speculates = speculates
        self.counted = SpecCounters()
        self.num_resends = 0

    def after_offload(self) -> None:
        """SGLang has lost drafts over a release and resume."""
        if self.speculates and self._has_weights:
            self._check_sums("the draft did not survive the offload")

    def after_push(self) -> None:
        """Compare checksums and run the canary; where it fails, the draft again, then a server without speculation."""
        self.counted = SpecCounters()
        if not self.speculates:
            return
        if self._has_weights:
            self._check_sums("the draft was changed, and not by a push of it")
        if not self.canary.prompts or self._is_well():
            return
        if self._has_weights and self._weights.can_mend_draft:
            self._mend()
            if self._is_well():
                logger.warning("the draft is accepted again")
                return
        logger.error("ALARM speculation is disabled: drafts are refused, and the draft is the one that was pushed")
        self.speculates = False
        self.speculates = not self._replace("speculation is disabled")

    def _check_sums(self, alarm: str) -> None:
        if not self._weights.draft_is_as_remembered():
            logger.error("ALARM %s", alarm)
            self._mend()

    def _is_well(self) -> bool:
        try:
            self.counted = self._loop.call(self.canary.run(self._client))
        except ServerGone as error:  # whoever watches the server brings it back, with its draft
            logger.warning("no canary reason=%s", error)
            return True
        return self.canary.judge(self.counted)

    def _mend(self) -> None:
        self.num_resends += 1
        if not self._weights.send_draft_again():
            self._replace("the draft is lost, and only its folder has it")
        self._weights.remember_draft()

    def _replace(self, why: str) -> bool:
        """False where the server is somebody else's, who reads the log."""
        try:
            self._replace_server(why)
        except PushError as error:
            logger.error("ALARM %s", error)
            return False
        return True
