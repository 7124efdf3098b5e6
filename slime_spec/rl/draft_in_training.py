"""A run's draft in training: when it learns, its pushes, and what engines draft with when acceptance falls at once."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing

from slime_spec.config.tree import Config
from slime_spec.errors import PushError
from slime_spec.interfaces import Engines, Trainer
from slime_spec.metrics.step import draft_push_metrics, draft_update_metrics
from slime_spec.rl.clock import PhaseClock
from slime_spec.rl.draft_updates import DraftUpdates
from slime_spec.speculation.net_benefit import NetBenefit
from slime_spec.types import DraftUpdateRecord, EngineStats
from slime_spec.weights.messages import NOT_COMPARABLE, VerifyPush
from slime_spec.weights.run import Broadcast, push_to_living, run_push

logger = logging.getLogger(__name__)
ACCEPT_LENGTH, TRAIN_TIME = "rollout/spec_accept_length", "perf/draft_train_time"


class DraftInTraining:
    """Keeps, for the length of a run, what the draft's updates depend on; ``engines`` is None where none generate."""

    def __init__(self, config: Config, trainer: Trainer, engines: Engines | None) -> None:
        settings = config.draft_training
        self._config, self._trainer, self._engines = config, trainer, engines
        self._updates = DraftUpdates(settings.update_policy, settings.update_interval, settings.update_horizon)
        self._is_ahead = False  # of what engines draft with
        self._pushed: tuple[int, str] | None = None  # version and checksum

    def decide(
        self,
        step: int,
        rollout: Mapping[str, float],
        rollout_s: float,
        before: Sequence[EngineStats],
        after: Sequence[EngineStats],
    ) -> tuple[bool, dict[str, float]]:
        """Return whether the draft learns from the rollout of a step, and the metrics of the decision.

        ``rollout`` are the rollout's metrics, ``before`` and ``after`` what the engines said around it.
        """
        accept_length = rollout.get(ACCEPT_LENGTH)
        self._updates.saw_rollout(accept_length, _drafting_s(rollout_s, before, after))
        decision = self._updates.decide(step)
        if decision.suspects_fault:
            logger.warning("accept length fell at once accept_length=%s", accept_length)
            self._check_engines()
        logger.info(
            "decided on the draft updates=%s saving_s=%.2f cost_s=%.2f",
            decision.updates,
            decision.saving_s,
            decision.cost_s,
        )
        return decision.updates, draft_update_metrics(decision.updates, decision.saving_s, decision.cost_s)

    def stepped(self, learned: bool, trained: Mapping[str, float]) -> None:
        """Note a step of the trainer; ``trained`` are its metrics."""
        trained_s = trained.get(TRAIN_TIME) if learned else None
        if trained_s is None:
            self._updates.left_out()
        else:
            self._updates.made(trained_s)
            self._is_ahead = True

    def push(self, version: int, clock: PhaseClock) -> dict[str, float]:
        """Bring every engine's draft to ``version``, where it has learned since it was pushed.

        A push that fails leaves the earlier draft in every engine, and the run goes on: a draft changes no sample. The
        next push brings what this one did not.
        """
        if not self._is_ahead or self._engines is None:
            return {}
        push = self._config.push
        with clock.phase("draft_sync"):
            try:
                report = push_to_living(
                    lambda receivers: self._trainer.push(version, "draft", receivers),
                    self._engines,
                    "draft",
                    push.verify,
                    push.pause_mode,
                )
            except PushError as error:
                logger.error(
                    "the draft was not pushed, engines go on with the one before version=%d: %s", version, error
                )
                return draft_push_metrics(None)
        if report is None:  # no engine is left, and those to come are brought what the next push brings
            return draft_push_metrics(None)
        self._is_ahead, self._pushed = False, (version, report.checksum)
        self._updates.pushed(report.seconds)
        return draft_push_metrics(report)

    def bring_up(self, engine: int, broadcast: Broadcast) -> None:
        """Bring the draft to an engine that is new, where one was pushed; without it, it drafts with the checkpoint's.

        Only of a draft that has learned since its last push, which failed, the engine has a newer one than the others.
        """
        if self._pushed is None:
            return
        version, _ = self._pushed
        try:
            with closing(self._trainer.push(version, "draft", (engine,), is_new=True)) as messages:
                run_push(messages, broadcast, self._config.push.verify)
        except PushError as error:
            logger.error("a new engine has not the draft that was pushed engine=%d error=%s", engine, error)
            self._is_ahead = True

    @property
    def record(self) -> DraftUpdateRecord:
        """Return what updates took and brought so far, from which ``resume`` goes on."""
        return self._updates.record

    def resume(self, version: int, record: DraftUpdateRecord | None) -> None:
        """Bring the draft of a resumed trainer to every engine; ``record`` is None where the checkpoint has none."""
        self._is_ahead = True
        self.push(version, PhaseClock())
        if record is not None:
            self._updates.record = record

    def _check_engines(self) -> None:
        """Have the draft pushed again where an engine drafts with another than was pushed."""
        if self._pushed is None or self._engines is None:
            return
        version, checksum = self._pushed
        try:
            replies = self._engines.broadcast(VerifyPush(version, "draft"))
            answers = {reply.checksum for reply in replies} or {NOT_COMPARABLE}  # without an engine nothing is known
        except PushError as error:
            logger.warning("engines did not say what they draft with: %s", error)
            answers = {NOT_COMPARABLE}
        if wrong := answers - {checksum, NOT_COMPARABLE}:
            logger.error("engines draft with other weights than were pushed checksums=%s pushed=%s", wrong, checksum)
            self._is_ahead = True
        elif NOT_COMPARABLE in answers:
            logger.warning("engines cannot say what they draft with, it is pushed again version=%d", version)
            self._is_ahead = True
        else:
            logger.info("engines draft with what was pushed version=%d: the policy has moved", version)


def _drafting_s(rollout_s: float, before: Sequence[EngineStats], after: Sequence[EngineStats]) -> float:
    """Return the seconds that an engine spent in rounds with drafts; of one that times no rounds, the whole rollout."""
    if not after or len(before) != len(after):
        return rollout_s
    total = NetBenefit()
    for was, now in zip(before, after, strict=True):
        total = total.plus(now.benefit.since(was.benefit))
    return total.drafted_s / len(after) if total.spent_s else rollout_s
