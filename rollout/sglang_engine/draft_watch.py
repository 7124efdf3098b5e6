"""DraftWatch judges whether a server's draft is intact and accepted, and says what to do where it is not.

Checksums that changed without a push, and drafts that the canary sees refused, mean a draft that was lost. It is sent
again, or read again from its folder by a new server; where that does not help, the server goes on without speculation.
"""

from __future__ import annotations

from enum import Enum, auto

from rollout.sglang_engine.canary import Canary
from slime_spec.types import SpecCounters


class Verdict(Enum):
    """Says what to do about the draft."""

    FINE = auto()
    RESEND = auto()  # the draft that was pushed
    RESTART = auto()  # the server, which reads the draft of its folder
    DISABLE = auto()  # speculation: a new server without it


class DraftWatch:
    """Judges what others have measured; calls no server. ``has_weights`` says that the drafter has weights to lose.

    ``is_pushed`` says that the engine has a draft to send; where it has none, only the draft's folder has the draft.
    """

    def __init__(self, canary: Canary, has_weights: bool) -> None:
        self.canary, self.has_weights = canary, has_weights

    def judge_sums(self, are_as_remembered: bool, is_pushed: bool) -> Verdict:
        """Judge the draft by whether its checksums are those remembered from when it was right."""
        return Verdict.FINE if are_as_remembered else _mending(is_pushed)

    def judge_canary(self, counted: SpecCounters | None, is_pushed: bool, is_proved: bool, is_mended: bool) -> Verdict:
        """Judge what the canary counted: None where the server did not answer it, which says nothing of the draft.

        ``is_proved``: the checksums say that the server has the right draft, so that its folder has no better one.
        ``is_mended``: the draft has just been sent or read again, which is tried once.
        """
        if counted is None or self.canary.judge(counted):
            return Verdict.FINE
        if is_mended or not self.has_weights or (is_proved and not is_pushed):
            return Verdict.DISABLE
        return _mending(is_pushed)


def _mending(is_pushed: bool) -> Verdict:
    return Verdict.RESEND if is_pushed else Verdict.RESTART
