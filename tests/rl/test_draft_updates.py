"""When the draft is updated: by the clock, by what it pays, or as engines may draft with something else."""

from collections.abc import Callable

import pytest

from slime_spec.config.draft_training import DraftTrainingConfig
from slime_spec.config.tree import Config
from slime_spec.rl.draft_in_training import DraftInTraining
from slime_spec.rl.draft_updates import Decision, DraftUpdates
from slime_spec.speculation.net_benefit import NetBenefit
from slime_spec.types import EngineStats
from slime_spec.weights.messages import PushMessage, PushReply, VerifyPush

COST_S = 2.0


def simulated(
    updates: DraftUpdates, num_steps: int, length: Callable[[int], float], drafting_s: float
) -> tuple[list[int], list[float]]:
    """The steps with an update, and each rollout's tokens per round, ``length`` of the steps since an update."""
    made, lengths, since = [], [], 0
    for step in range(num_steps):
        lengths.append(length(since))
        updates.saw_rollout(lengths[-1], drafting_s)
        since += 1
        if updates.decide(step).updates:
            made.append(step)
            updates.made(COST_S / 2)
            updates.pushed(COST_S / 2)
            since = 0
        else:
            updates.left_out()
    return made, lengths


def test_every_nth_step_is_every_nth_step() -> None:
    made, _ = simulated(DraftUpdates("every", 3, 10), 10, lambda since: 3.0, 1.0)
    assert made == [2, 5, 8]


def test_a_draft_that_does_not_fall_behind_is_only_looked_at_now_and_then() -> None:
    made, _ = simulated(DraftUpdates("when_it_pays", 1, 10), 40, lambda since: 3.0, 100.0)
    assert made == [0, 1, 12, 23, 34]


def test_a_draft_that_falls_behind_is_updated_as_often_as_its_rollouts_are_long() -> None:
    def falling(since: int) -> float:
        return 3.0 - 0.1 * since

    often, rarely = (
        simulated(DraftUpdates("when_it_pays", 1, 10), 40, falling, drafting_s)[0] for drafting_s in (20.0, 3.0)
    )
    assert often == list(range(0, 1)) + list(range(1, 40, 2))
    assert 5 < len(rarely) < 15
    never = simulated(DraftUpdates("when_it_pays", 1, 10), 40, falling, 0.01)[0]
    assert never == [0, 1, 12, 23, 34], "an update costs more than all that such rollouts take"


def test_a_draft_that_still_learns_is_updated_though_it_loses_nothing() -> None:
    updates, learned = DraftUpdates("when_it_pays", 1, 10), 1.0
    made = []
    for step in range(30):
        updates.saw_rollout(learned, 20.0)
        if updates.decide(step).updates:
            made.append(step)
            updates.made(COST_S)
            updates.pushed(0.0)
            learned += 0.5 * (3.0 - learned)
        else:
            updates.left_out()
    assert made[:6] == [0, 1, 2, 3, 4, 5]
    assert len(made) < 15, "a draft that has learned is left alone"


def test_an_update_pays_by_the_seconds_that_it_saves() -> None:
    updates = DraftUpdates("when_it_pays", 1, horizon=2)
    for length in (2.0, 3.0):
        updates.saw_rollout(length, 10.0)
        updates.made(COST_S)
        updates.pushed(0.0)
    updates.saw_rollout(3.0, 10.0)  # follows an update, as the one before: 3.0 is what updates bring
    updates.left_out()
    updates.saw_rollout(2.6, 10.0)  # 0.4 lost in a step, half of which counts: d = 0.2
    decision = updates.decide(3)
    # Rollouts behind updates had 3.0 and 3.0: nothing is added to that.
    expected = 10.0 * ((1 - 2.4 / 2.8) + (1 - 2.2 / 2.6))
    assert decision == Decision(True, pytest.approx(expected), COST_S)


def test_rollouts_without_drafts_say_nothing() -> None:
    updates = DraftUpdates("when_it_pays", 1, 10)
    made = 0
    for step in range(12):
        updates.saw_rollout(None, 0.0)
        if updates.decide(step).updates:
            made += 1
            updates.made(COST_S)
        else:
            updates.left_out()
    assert made == 2


@pytest.mark.parametrize("policy", ["every", "when_it_pays"])
@pytest.mark.parametrize("follows_update", [True, False])
def test_a_sudden_loss_is_looked_into_and_is_no_rate_of_drift(policy: str, follows_update: bool) -> None:
    """Behind an update, too: a push that went wrong is the likeliest cause."""
    updates = DraftUpdates(policy, 100, 10)
    for step, length in enumerate((3.0, 3.0, 3.0, 2.5)):
        updates.saw_rollout(length, 1.0)
        decision = updates.decide(step)
        if follows_update:
            updates.made(COST_S)
            updates.pushed(0.0)
        else:
            updates.left_out()
    assert decision.suspects_fault
    updates.saw_rollout(2.5, 1.0)
    assert not updates.decide(4).suspects_fault


def test_after_a_change_of_task_a_draft_learns_on_though_it_was_better_before() -> None:
    """Lengths of a run whose second task begins at step 8, which had stopped learning at 2.0 of a possible 2.5."""
    updates = DraftUpdates("when_it_pays", 1, 10)
    lengths = [1.9, 2.2, 2.4, 2.6, 2.9, 2.9, 3.1, 3.1]
    for step, length in enumerate(lengths):
        updates.saw_rollout(length, 5.0)
        if updates.decide(step).updates:
            updates.made(2.0)
            updates.pushed(0.1)
        else:
            updates.left_out()
    learned, made = 1.3, 0
    for step in range(8, 16):
        updates.saw_rollout(learned, 5.0)
        if updates.decide(step).updates:
            updates.made(2.0)
            updates.pushed(0.1)
            learned, made = learned + 0.15 * (2.8 - learned), made + 1
        else:
            updates.left_out()
    assert made >= 7
    assert learned > 2.3


def test_what_was_learned_and_not_pushed_says_nothing_of_what_updates_bring() -> None:
    pushed, kept = (DraftUpdates("when_it_pays", 1, 10) for _ in range(2))
    for updates in (pushed, kept):
        updates.saw_rollout(3.0, 10.0)
        updates.made(COST_S)
    pushed.pushed(0.0)
    for updates in (pushed, kept):
        updates.saw_rollout(2.9, 10.0)
    assert (pushed.record.fresh, pushed.record.lost_per_step) == (2.9, 0.0)
    assert (kept.record.fresh, kept.record.lost_per_step) == (None, pytest.approx(0.05))


class Engines:
    """Engines that say what they draft with."""

    def __init__(self, checksum: str) -> None:
        self.checksum, self.asked = checksum, 0

    def broadcast(self, message: PushMessage) -> list[PushReply]:
        assert isinstance(message, VerifyPush)
        assert message.side == "draft"
        self.asked += 1
        return [PushReply(0, message.version, self.checksum)]


@pytest.mark.parametrize(("checksum", "pushed_again"), [("as pushed", False), ("overwritten", True), ("", True)])
def test_a_draft_that_was_overwritten_or_cannot_be_compared_is_pushed_again(checksum: str, pushed_again: bool) -> None:
    engines = Engines(checksum)
    config = Config(draft_training=DraftTrainingConfig(enable=True, update_interval=100))
    draft = DraftInTraining(config, None, engines)  # type: ignore[arg-type]
    draft._pushed = (3, "as pushed")
    stats = [EngineStats(3, 0, 0, 0, 0, True, 0, benefit=NetBenefit())]
    for step, length in enumerate((3.0, 3.0, 1.2)):
        draft.decide(step, {"rollout/spec_accept_length": length}, 1.0, stats, stats)
        draft.stepped(False, {})
    assert engines.asked == 1
    assert draft._is_ahead == pushed_again
