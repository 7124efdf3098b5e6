"""The loop of a run that trains its draft: what is pushed, when, and what a push that fails leaves."""

import json
from dataclasses import asdict, replace

import pytest

from slime_spec.config.draft_training import DraftTrainingConfig
from slime_spec.config.tree import Config, RunConfig
from slime_spec.interfaces import RunState
from slime_spec.rl.draft_in_training import DraftInTraining
from slime_spec.rl.loop import first_state, run_loop
from tests.support.loop_recorder import START, Recorder, config, job


def with_draft(num_rollout: int, interval: int = 1) -> Config:
    return replace(config(num_rollout, interval), draft_training=DraftTrainingConfig(enable=True))


def test_a_draft_in_training_is_pushed_behind_the_policy_under_its_version():
    recorder = Recorder()
    run_loop(job(recorder, with_draft(2)), START)
    assert [event for event in recorder.events if event.startswith("push")] == [
        *("push 1", "push draft 1", "push 2", "push draft 2")
    ]
    assert recorder.logged[1]["sync/draft_pushed"] == 1.0
    assert recorder.logged[1]["perf/draft_sync_time"] > 0


def test_a_draft_that_an_engine_refuses_stays_behind_and_the_next_push_brings_it(caplog: pytest.LogCaptureFixture):
    recorder = Recorder(refuse_draft=2)
    end = run_loop(job(recorder, with_draft(3)), START)
    assert end.weight_version == 3
    assert [event for event in recorder.events if event.startswith(("push", "cancel"))] == [
        *("push 1", "push draft 1", "push 2", "cancel 2", "push 3", "push draft 3")
    ]
    assert [recorder.logged[step]["sync/draft_pushed"] for step in range(3)] == [1.0, 0.0, 1.0]
    assert "engines go on with the one before version=2: push of version 2 failed: an engine refused" in caplog.text


def test_a_resumed_run_pushes_its_draft_before_engines_serve():
    recorder = Recorder(resumed=RunState(rollout_id=4, next_prompt_id=8, weight_version=3, is_ahead=True))
    resumed = with_draft(9)
    draft = DraftInTraining(resumed, recorder, recorder)  # type: ignore[arg-type]
    first_state(resumed, recorder.resumed, recorder, recorder, draft)  # type: ignore[arg-type]
    assert recorder.events == ["push 4", "push draft 4"]


def test_a_resumed_run_knows_what_its_updates_took_and_brought():
    """It decides as the run that went on would: the record comes back from what a checkpoint keeps."""
    recorder, settings = Recorder(), DraftTrainingConfig(enable=True, update_policy="when_it_pays")
    learning = replace(config(9), draft_training=settings)
    end = run_loop(job(recorder, replace(learning, run=RunConfig(num_rollout=5))), START)
    assert end.draft_updates is not None
    assert end.draft_updates.num_updates >= 2
    assert end.draft_updates.cost_s > 0
    saved = RunState.of_checkpoint(json.loads(json.dumps(asdict(end))))
    resumed = DraftInTraining(learning, recorder, recorder)  # type: ignore[arg-type]
    state = first_state(learning, saved, recorder, recorder, resumed)  # type: ignore[arg-type]
    assert resumed.record == end.draft_updates == state.draft_updates


def test_a_draft_that_did_not_learn_is_not_pushed():
    recorder = Recorder()
    settings = DraftTrainingConfig(enable=True, update_interval=2)
    run_loop(job(recorder, replace(config(5), draft_training=settings)), START)
    assert [event for event in recorder.events if event.startswith("push draft")] == ["push draft 2", "push draft 4"]
    assert [recorder.logged[step]["spec/draft_update"] for step in range(5)] == [0.0, 1.0, 0.0, 1.0, 0.0]
    assert "train/draft_loss" not in recorder.logged[0]
    assert recorder.logged[1]["train/draft_accept_length/block"] == 2.6


def test_a_draft_that_learned_between_pushes_goes_with_the_next():
    recorder = Recorder()
    settings = DraftTrainingConfig(enable=True, update_interval=3)
    run_loop(job(recorder, replace(config(5, interval=2), draft_training=settings)), START)
    assert [event for event in recorder.events if event.startswith("push")] == ["push 1", "push 2", "push draft 2"]
