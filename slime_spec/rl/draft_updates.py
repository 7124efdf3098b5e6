"""Decide, step by step, whether the draft is updated: trained on the step's rollout, and pushed.

Of an update that is made now, the next H steps save

    Σ_j  drafting_s · (1 - τ_stale(j) / τ_new(j)),    τ_stale(j) = τ_now - d·j,    τ_new(j) = τ_new - d·j

seconds: drafting_s is the time of a rollout's rounds with drafts, τ_now the tokens per round of the last rollout, d
what a step without an update costs of them. τ_new is what rollouts right after an update had, and what each of the last
updates has added to that: a draft that is still learning gains beyond what it has lost. An update is made where it
saves more than it takes, and once in H steps to see what it brings now.

A sudden loss is no drift of the policy: what the engines draft with is looked at first, and what updates bring is
measured anew, for a task may have changed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from slime_spec.types import DraftUpdateRecord

EVERY, WHEN_IT_PAYS = "every", "when_it_pays"
NUM_MEASURED = 2  # updates that are made to learn what an update costs and brings
WEIGHT_OF_NEWEST = 0.5
SUDDEN = 0.15  # share of tokens per round, lost from a step to the next


@dataclass(frozen=True)
class Decision:
    """Says whether to update, and by what numbers; ``suspects_fault``: what the engines draft with is to be checked."""

    updates: bool
    saving_s: float = 0.0
    cost_s: float = 0.0
    suspects_fault: bool = False


class DraftUpdates:
    """Decides by ``policy``: every ``interval`` steps, or when it pays over ``horizon`` steps. Example::

    updates = DraftUpdates("when_it_pays", interval=1, horizon=10)
    updates.saw_rollout(accept_length=2.4, drafting_s=1.2)
    decision = updates.decide(step=7)
    updates.made(cost_s=2.0) if decision.updates else updates.left_out()
    updates.pushed(push_s=0.1)  # what was made
    """

    def __init__(self, policy: str, interval: int, horizon: int) -> None:
        self._policy, self._interval, self._horizon = policy, interval, horizon
        self.record = DraftUpdateRecord()  # what a checkpoint keeps of the run so far

    def saw_rollout(self, accept_length: float | None, drafting_s: float) -> None:
        """Note a rollout's tokens per round, None where nothing was drafted, and the time of its rounds with drafts."""
        was = self.record
        self.record = replace(was, accept_length=accept_length, drafting_s=drafting_s, is_sudden=False)
        if accept_length is None:
            return
        if was.accept_length is not None and accept_length < (1.0 - SUDDEN) * was.accept_length:
            # Measure anew what updates bring: of other tasks, or a draft that was damaged, it is something else.
            self._note(is_sudden=True, fresh=None, newest_fresh=None, gain=None, lost_per_step=0.0, num_measured=0)
        elif was.follows_update:
            if was.newest_fresh is not None:
                self._note(gain=_averaged(was.gain, accept_length - was.newest_fresh))
            self._note(newest_fresh=accept_length, fresh=_averaged(was.fresh, accept_length))
        elif was.accept_length is not None:
            self._note(lost_per_step=max(0.0, _averaged(was.lost_per_step, was.accept_length - accept_length)))

    def decide(self, step: int) -> Decision:
        """Return whether the step that has just been rolled out, the run's ``step`` from 0, updates the draft."""
        record = self.record
        if self._policy == EVERY:
            is_due = (step + 1) % self._interval == 0
            return Decision(is_due, cost_s=record.cost_s, suspects_fault=record.is_sudden)
        is_due = record.num_measured < NUM_MEASURED or record.num_left_out >= self._horizon
        if is_due or record.is_sudden:
            return Decision(True, cost_s=record.cost_s, suspects_fault=record.is_sudden)
        saving_s = self._saving_s()
        return Decision(saving_s > record.cost_s, saving_s, record.cost_s)

    def made(self, cost_s: float) -> None:
        """Note an update and the seconds of its training."""
        was = self.record
        self._note(
            num_updates=was.num_updates + 1,
            num_measured=was.num_measured + 1,
            num_left_out=0,
            follows_update=False,
            cost_s=_averaged(was.cost_s, cost_s) if was.num_updates else cost_s,
        )

    def pushed(self, push_s: float) -> None:
        """Note the seconds of the push of what was made last: the next rollout drafts with it."""
        was = self.record
        added = WEIGHT_OF_NEWEST * push_s if was.num_updates > 1 else push_s
        self._note(follows_update=True, cost_s=was.cost_s + added)

    def left_out(self) -> None:
        self._note(num_left_out=self.record.num_left_out + 1, follows_update=False)

    def _note(self, **changed: Any) -> None:
        self.record = replace(self.record, **changed)

    def _saving_s(self) -> float:
        record = self.record
        if record.accept_length is None or record.fresh is None:
            return 0.0
        new, saved = max(record.fresh, record.accept_length) + max(0.0, record.gain or 0.0), 0.0
        for step in range(1, self._horizon + 1):
            lost = record.lost_per_step * step
            # A round brings a token whatever its draft is.
            saved += record.drafting_s * (1.0 - max(1.0, record.accept_length - lost) / max(1.0, new - lost))
        return saved


def _averaged(old: float | None, new: float) -> float:
    return new if old is None else (1.0 - WEIGHT_OF_NEWEST) * old + WEIGHT_OF_NEWEST * new
