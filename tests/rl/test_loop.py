"""The loop's order of events, with parts that only record what they were asked."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import pytest

from slime_spec.config.tree import SpeculativeConfig
from slime_spec.errors import PushError, RewardError
from slime_spec.interfaces import RunState
from slime_spec.rl.loop import _bring_up, first_state, run_loop
from slime_spec.rl.rollouts import Rollout, SamplesRefused
from slime_spec.types import TrainReport
from slime_spec.weights.messages import (
    CommitPush,
    PushReply,
    Side,
)
from tests.support.loop_recorder import START, Recorder, config, job


def test_a_step_generates_trains_with_released_engines_pushes_and_logs():
    recorder = Recorder()
    end = run_loop(job(recorder, config()), START)
    assert recorder.events == [
        *("generate@0", "release", "train 2", "resume", "push 1", "log 0"),
        *("generate@1", "release", "train 2", "resume", "push 2", "log 1"),
    ]
    assert end == RunState(rollout_id=2, next_prompt_id=6, weight_version=2)


def test_weights_are_pushed_every_interval_steps():
    recorder = Recorder()
    run_loop(job(recorder, config(num_rollout=5, interval=2)), START)
    assert [event for event in recorder.events if event.startswith(("push", "generate"))] == [
        *("generate@0", "generate@0", "push 1", "generate@1", "generate@1", "push 2", "generate@2")
    ]


def test_apart_from_each_other_engines_keep_their_memory():
    recorder = Recorder()
    apart = config(num_rollout=1)
    run_loop(job(recorder, replace(apart, cluster=replace(apart.cluster, colocate=False))), START)
    assert "release" not in recorder.events


@pytest.mark.parametrize("trainer", [True, False])
def test_a_step_without_any_reward_ends_the_run_with_the_last_error(trainer: bool):
    """Case reports/04: every sample excluded, the weights exported as they came, exit code 0."""
    recorder = Recorder(rewards=(None, None))
    with pytest.raises(RewardError, match=r"no sample of step 0 has a reward \(2 samples\): the reward raised"):
        run_loop(job(recorder, config(num_rollout=1), trainer=trainer), START)
    assert recorder.events == ["generate@0"]


def test_samples_that_a_function_failed_on_are_kept_before_the_run_ends():
    recorder = Recorder()
    made = recorder.rollout(START, None).samples

    class Refuses:
        def rollout(self, state, progress):
            raise SamplesRefused("the filter raised X", made)

    kept = []
    loop = replace(job(recorder, config()), rollouts=Refuses(), keep_samples=lambda *given: kept.append(given))
    with pytest.raises(SamplesRefused, match="the filter raised X"):
        run_loop(loop, START)
    assert kept == [(0, made)]


@pytest.mark.parametrize(("save_interval", "expected"), [(None, []), (2, ["save 2", "save 3"]), (3, ["save 3"])])
def test_a_rollout_that_fails_leaves_the_last_finished_step_saved_once(
    save_interval: int | None, expected: list[str], caplog: pytest.LogCaptureFixture
):
    recorder = Recorder()
    loop = job(recorder, config(num_rollout=9, save_interval=save_interval))
    rollout = recorder.rollout

    def lost(state: RunState, progress) -> Rollout:
        if state.rollout_id == 3:
            raise RuntimeError("an engine is gone")
        return rollout(state, progress)

    recorder.rollout = lost  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="an engine is gone"):
        run_loop(loop, START)
    assert [event for event in recorder.events if event.startswith("save")] == expected
    assert ("step 3 failed, the steps before it are saved: an engine is gone" in caplog.text) == (
        "save 3" in expected[1:]
    )


def test_a_step_that_fails_in_training_saves_nothing():
    """The weights and the optimizer may stand between two steps."""
    recorder = Recorder(refuse_version=2)
    with pytest.raises(PushError):
        run_loop(job(recorder, config(num_rollout=4, save_interval=3)), START)
    assert not [event for event in recorder.events if event.startswith("save")]


def test_one_reward_is_enough_to_go_on():
    recorder = Recorder(rewards=(None, 1.0))
    run_loop(job(recorder, config(num_rollout=1)), START)
    assert "log 0" in recorder.events


def test_rollout_only_never_trains_pushes_or_releases():
    recorder = Recorder()
    end = run_loop(job(recorder, config(), trainer=False), START)
    assert recorder.events == ["generate@0", "log 0", "generate@0", "log 1"]
    assert end.weight_version == 0


def test_train_only_has_no_engines_to_push_to():
    recorder = Recorder()
    run_loop(job(recorder, config(num_rollout=1), engines=False), START)
    assert recorder.events == ["generate@0", "train 2", "log 0"]


def test_checkpoints_are_saved_every_interval_with_where_the_run_goes_on():
    recorder = Recorder()
    run_loop(job(recorder, config(num_rollout=4, save_interval=2)), START)
    assert [event for event in recorder.events if event.startswith("save")] == ["save 2", "save 4"]


def test_the_last_step_is_saved_whatever_the_interval():
    recorder = Recorder()
    run_loop(job(recorder, config(num_rollout=5, save_interval=2)), START)
    assert [event for event in recorder.events if event.startswith("save")] == ["save 2", "save 4", "save 5"]


STEP = ["generate@0", "release", "train 2", "resume", "push 1", "log 0"]


@pytest.mark.parametrize(
    ("stop_at", "expected", "is_ahead"),
    [
        ("generate@0", ["generate@0"], False),
        ("train 2", [*STEP[:4], "log 0", "save 1"], True),
        ("push 1", [*STEP, "save 1"], False),
        ("log 0", [*STEP, "save 1"], False),
        ("generate@1", [*STEP, "generate@1", "save 1"], False),
        ("save 2", [*STEP, "generate@1", *STEP[1:4], "push 2", "log 1", "save 2"], False),
    ],
)
def test_a_signal_ends_the_run_in_order_whenever_it_comes(stop_at, expected, is_ahead):
    """Case reports/06: a rollout is interrupted, all else is finished, and the last finished step is saved once."""
    recorder = Recorder(stop_at=stop_at)
    end = run_loop(job(recorder, config(num_rollout=4, save_interval=2)), START)
    assert recorder.events == expected
    assert end.rollout_id == len([event for event in expected if event.startswith("log")])
    assert end.is_ahead == is_ahead


def test_without_checkpoints_a_signal_saves_none():
    recorder = Recorder(stop_at="log 0")
    run_loop(job(recorder, config(num_rollout=4)), START)
    assert recorder.events == STEP


def test_an_interrupt_that_no_signal_asked_for_is_not_taken_for_an_end():
    recorder = Recorder()
    loop = job(recorder, config())

    def interrupted(state: RunState, progress) -> Rollout:
        raise KeyboardInterrupt

    recorder.rollout = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run_loop(loop, START)


def test_prompts_that_a_step_left_unfinished_are_part_of_where_the_run_is():
    end = run_loop(job(Recorder(unfinished=(1, 4)), config(num_rollout=1)), START)
    assert end == RunState(rollout_id=1, next_prompt_id=3, weight_version=1, unfinished_prompt_ids=(1, 4))


@pytest.mark.parametrize(("num_rollout", "is_done"), [(3, True), (2, True), (4, False)])
def test_a_checkpoint_with_nothing_left_to_do_is_told(
    num_rollout: int, is_done: bool, caplog: pytest.LogCaptureFixture
):
    """Case reports/10."""
    recorder = Recorder(resumed=RunState(3, 9, 3))
    first_state(config(num_rollout), recorder.load(), recorder, recorder)  # type: ignore[arg-type]
    assert (f"nothing to do: the checkpoint is at step 3 of {num_rollout}" in caplog.text) == is_done


def test_a_resumed_run_starts_at_its_step():
    recorder = Recorder()
    run_loop(job(recorder, config(num_rollout=4)), RunState(rollout_id=3, next_prompt_id=9, weight_version=3))
    assert [event for event in recorder.events if event.startswith(("log", "push"))] == ["push 4", "log 3"]


@dataclass
class Lives(Recorder):
    """A run of several lives, each resumed from the last one's checkpoint: the weights are the steps trained."""

    weights: int = 0
    pushed: dict[int, int] = field(default_factory=dict)

    def step(self, samples, learns_draft: bool = True) -> TrainReport:
        self.weights += 1
        return super().step(samples)

    def broadcast(self, message) -> list[PushReply]:
        if isinstance(message, CommitPush):
            assert self.pushed.setdefault(message.version, self.weights) == self.weights, "two weights have one version"
        return super().broadcast(message)


@pytest.mark.parametrize("intervals", list(product((None, 1, 2, 3), repeat=3)))
def test_a_version_names_the_same_weights_in_every_life_of_a_run_whatever_the_push_interval(intervals):
    """Case audit/73; None is a life without engines."""
    lives = Lives()
    for number, interval in enumerate(intervals):
        asked = config(num_rollout=3 + 5 * number, interval=interval or 1)
        engines = None if interval is None else lives
        first = first_state(asked, lives.load(), lives, engines)  # type: ignore[arg-type]
        if engines is not None and lives.resumed is not None:
            assert lives.pushed[first.weight_version] == lives.weights, "engines begin with the trainer's weights"
        lives.resumed = run_loop(job(lives, asked, engines=engines is not None), first)
        assert lives.resumed.is_ahead == (lives.pushed.get(lives.resumed.weight_version, 0) != lives.weights)


def test_the_weights_of_a_checkpoint_that_does_not_say_whether_they_were_pushed_get_a_version_of_their_own():
    """Case audit/73."""
    state = RunState.of_checkpoint({"rollout_id": 3, "next_prompt_id": 24, "weight_version": 1})
    recorder = Recorder(resumed=state)
    assert first_state(config(interval=3), recorder.load(), recorder, recorder) == RunState(3, 24, 2)  # type: ignore[arg-type]
    assert recorder.events == ["push 2"]


def test_a_refused_push_is_cancelled_and_ends_the_run_loudly():
    recorder = Recorder(refuse_version=1)
    with pytest.raises(PushError, match="refused"):
        run_loop(job(recorder, config()), START)
    assert recorder.events[-1] == "cancel 1"
    assert recorder.version == 0


def test_a_step_logs_what_the_engines_say_and_the_canary_of_its_push():
    recorder = Recorder()
    asked = replace(config(num_rollout=3, interval=2), speculative=SpeculativeConfig(algorithm="EAGLE3"))
    run_loop(job(recorder, asked), START)
    assert [values.get("sync/canary_accept_length") for values in recorder.logged.values()] == [None, 2.0, None]
    assert [values["engine/speculating"] for values in recorder.logged.values()] == [1.0, 1.0, 1.0]
    assert recorder.logged[0]["spec/break_even_length"] == 1.5
    assert [values["spec/net_speedup_est"] for values in recorder.logged.values()] == pytest.approx([1.4] * 3)


def test_a_disabled_speculation_shows_in_the_step_after_which_it_was_disabled():
    recorder = Recorder()
    asked = replace(config(num_rollout=3), speculative=SpeculativeConfig(algorithm="EAGLE3"))
    run_loop(job(recorder, asked), START)
    assert [values["engine/speculating"] for values in recorder.logged.values()] == [1.0, 0.0, 0.0]


def test_without_engines_nothing_is_said_of_them():
    recorder = Recorder()
    run_loop(job(recorder, config(num_rollout=1), engines=False), START)
    assert not [name for name in recorder.logged[0] if name.startswith(("engine/", "spec/break_even"))]


@dataclass
class Renewed(Recorder):
    """Says of each push whom it is for."""

    pushed: list[tuple[str, int, tuple[int, ...], bool]] = field(default_factory=list)

    def push(self, version: int, side: Side = "target", receivers: Sequence[int] = (), is_new: bool = False):
        self.pushed.append((side, version, tuple(receivers), is_new))
        return super().push(version, side, receivers, is_new)


def test_an_engine_that_is_new_is_brought_to_what_the_others_serve_once_nobody_is_ahead():
    """Before the first push it has the checkpoint's weights, as the others have."""
    recorder = Renewed()
    run_loop(job(recorder, config(num_rollout=3, interval=2)), RunState(0, 0, 0))
    asked = job(recorder, config(interval=2))
    recorder.pushed.clear()
    for state, expected in (
        (RunState(0, 0, 0), (True, [])),
        (RunState(1, 3, 0, is_ahead=True), (True, [])),
        (RunState(2, 6, 1), (True, [("target", 1, (4,), True)])),
        (RunState(3, 9, 1, is_ahead=True), (False, [])),
    ):
        recorder.pushed.clear()
        assert (_bring_up(asked, state, 4, recorder.broadcast), recorder.pushed) == expected


def test_a_run_without_a_trainer_brings_up_nothing():
    recorder = Renewed()
    assert _bring_up(job(recorder, config(), trainer=False), RunState(0, 0, 0), 1, recorder.broadcast)
    assert recorder.pushed == []
