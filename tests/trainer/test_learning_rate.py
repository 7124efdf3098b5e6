"""The learning rate of each optimizer step against Megatron's scheduler."""

from typing import Any

import pytest

from slime_spec.config.tree import Config, RolloutConfig, RunConfig, TrainerConfig
from tests.trainer.trainer_support import run_ranks
from trainer_bridge.learning_rate import LearningRate

SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"lr_warmup_steps": 4},
    "linear": {"lr_decay_style": "linear", "lr_warmup_steps": 3, "min_lr": 0.125},
    "cosine": {"lr_decay_style": "cosine", "lr_warmup_fraction": 0.15, "min_lr": 0.25, "lr_decay_iters": 10},
    "cosine without warm-up": {"lr_decay_style": "cosine"},
}


def config(num_rollout: int = 12, **trainer: Any) -> Config:
    return Config(
        run=RunConfig(num_rollout=num_rollout),
        rollout=RolloutConfig(batch_size=3, n_samples_per_prompt=4),
        trainer=TrainerConfig(lr=1.0, **trainer),
    )


@pytest.mark.parametrize("trainer", SCHEDULES.values(), ids=SCHEDULES)
def test_rates_are_megatrons_after_warm_up_and_a_step_ahead_in_it(trainer: dict[str, Any]) -> None:
    rate = LearningRate.of(config(**trainer))
    (theirs,) = run_ranks(1, "megatron_rates", rate, 15)
    for step in range(14):
        in_warmup = step + 1 < rate.num_warmup_steps
        held_at_the_top = not in_warmup and step < rate.num_warmup_steps
        expected = 1.0 if held_at_the_top else theirs[step + 1 if in_warmup else step]
        assert rate(step) == pytest.approx(expected), step
    assert rate(0) > 0.0


def test_a_linear_decay_by_hand() -> None:
    rate = LearningRate.of(config(num_rollout=4, lr_decay_style="linear"))
    assert [rate(step) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    warm = LearningRate.of(config(num_rollout=6, lr_decay_style="linear", lr_warmup_steps=2, min_lr=0.5))
    assert [warm(step) for step in range(7)] == [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5]


def test_warm_up_is_linear_and_stays() -> None:
    rate = LearningRate.of(config(lr_warmup_steps=4))
    assert [rate(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert LearningRate.of(config())(0) == 1.0


@pytest.mark.parametrize("split", [{"num_steps_per_rollout": 4}, {"global_batch_size": 3}, {"global_batch_size": 12}])
def test_a_decay_is_over_the_optimizer_steps_of_the_run(split: dict[str, int]) -> None:
    per_rollout = 12 // (split.get("global_batch_size") or 3)
    rate = LearningRate.of(config(num_rollout=5, lr_decay_style="cosine", **split))
    assert rate.num_decay_steps == 5 * per_rollout
