"""Sees that the draft is still there, mends it, and gives speculation up, loudly, where it cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable

from rollout.sglang_engine.canary import Canary
from rollout.sglang_engine.client import SglangClient
from rollout.sglang_engine.loop_thread import AsyncLoop
from rollout.sglang_engine.weights import ServerWeights

logger = logging.getLogger(__name__)


class DraftWatch:
    """``has_weights``: the drafter has weights that can be lost. ``speculates`` turns false when all else failed."""

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

    def after_offload(self) -> None:
        """SGLang has lost drafts over a release and resume: the same checksums, or the draft again."""
        if self.speculates and self._has_weights and not self._weights.draft_is_as_remembered():
            logger.error("ALARM the draft did not survive the offload")
            self._mend()

    def after_push(self) -> None:
        """Run the canary; where it fails, the draft again, then a server that does not speculate."""
        if not self.speculates or not self.canary.prompts or self._is_well():
            return
        if self._has_weights:
            self._mend()
            if self._is_well():
                logger.warning("the draft is accepted again")
                return
        logger.error("ALARM speculation is disabled: drafts are refused, and the draft is the one that was pushed")
        self.speculates = False
        self._replace_server("speculation is disabled")

    def _is_well(self) -> bool:
        accepted = self._loop.call(self.canary.accepted_per_round(self._client))
        return accepted is None or self.canary.judge(accepted)

    def _mend(self) -> None:
        if not self._weights.send_draft_again():
            self._replace_server("the draft is lost, and only its folder has it")
        self._weights.remember_draft()
