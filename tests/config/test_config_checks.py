"""Contradictions among settings are refused before anything starts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime_spec.config.checks import check, notes
from slime_spec.config.tree import Config, PushConfig, RunConfig, TrainerConfig
from slime_spec.errors import ConfigError
from slime_spec.launch.compose import compose
from tests.support.refused_launches import CONTRADICTIONS, TRAIN_ONLY


@pytest.mark.parametrize(("argv", "setting"), CONTRADICTIONS)
def test_a_contradiction_is_refused_by_the_setting_to_change(argv: str, setting: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(argv.split())
    assert caught.value.setting == setting
    assert caught.value.remedy


@pytest.mark.parametrize(
    "argv",
    [
        "--sp-min-token-match 4 --sp-max-token-match 4",
        TRAIN_ONLY,
        f"{TRAIN_ONLY} --n-samples-per-prompt 1 --rollout-temperature 0",
        "--save-debug-rollout-data d.pt --num-rollout 1",
        "--save-debug-rollout-data d_{rollout_id}.pt",
        "--prompt-data d.jsonl",
        "--prompt-data d.jsonl --rm-type exact --label-key answer",
        f"{TRAIN_ONLY} --global-batch-size 10",
        "--prompt-data d.jsonl --task",
        "--sglang-context-length 100 --rollout-max-prompt-len 80 --rollout-max-response-len 20",
        "--debug-rollout-only --rollout-temperature 0 --n-samples-per-prompt 1",
        "--debug-rollout-only --rollout-num-gpus-per-engine 1",
        "--rollout-batch-size 4 --n-samples-per-prompt 4 --global-batch-size 8",
        "--rollout-batch-size 4 --n-samples-per-prompt 4 --num-steps-per-rollout 2 --global-batch-size 8",
        "--advantage-estimator reinforce_plus_plus --n-samples-per-prompt 1",
        "--kl-coef 0.1 --kl-loss-coef 0.00",
        "--use-tis --tis-clip 0.5 --tis-clip-low 0.5",
        "--num-rollout 5 --lr-warmup-iters 5",
        "--num-rollout 5 --lr-warmup-iters 4 --lr-decay-style linear --min-lr 1e-5",
        "--actor-world-size 4 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
        "--rollout-num-gpus-per-engine 1 --actor-num-gpus 1",
        "--rollout-num-gpus-per-engine 1 --no-colocate",
    ],
)
def test_its_legal_neighbour_is_not(argv: str) -> None:
    assert compose(argv.split()) != compose(["--run-name", "anything else"])


def test_rollouts_alone_train_no_draft_whatever_a_recipe_says_and_note_it() -> None:
    training = ["--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", "d", "--enable-draft-training"]
    assert compose(training).trains_draft
    alone = compose([*training, "--debug-rollout-only"])
    assert not alone.trains_draft
    assert "A run of rollouts alone trains no draft, and --enable-draft-training has no effect." in list(notes(alone))


def test_a_flag_that_the_engine_cannot_use_is_noted_by_name() -> None:
    (note,) = notes(compose(["--sglang-page-size", "16"]))
    assert "--sglang-page-size" in note
    assert list(notes(compose([]))) == []


@given(num_rollout=st.integers(1, 3000), interval=st.integers(1, 30))
def test_a_run_that_names_a_folder_for_checkpoints_saves_ten_times_or_more(num_rollout: int, interval: int) -> None:
    """Case reports/06: a preempted run loses twenty steps at most, or one push interval."""
    config = Config(
        run=RunConfig(num_rollout=num_rollout), trainer=TrainerConfig(save="ck"), push=PushConfig(interval=interval)
    )
    check(config)
    assert config.save_interval is not None
    assert config.save_interval % interval == 0
    assert config.save_interval < min(20, num_rollout / 10 + 1) + interval
    assert replace(config, trainer=TrainerConfig(save="ck", save_interval=7)).save_interval == 7
    assert replace(config, trainer=TrainerConfig()).save_interval is None
