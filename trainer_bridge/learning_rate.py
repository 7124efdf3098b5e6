"""This module computes the learning rate of each optimizer step."""

from slime_spec.config.tree import TrainerConfig


def learning_rate(trainer: TrainerConfig, optimizer_step: int) -> float:
    """Return the rate: linear warm-up, then constant; ``optimizer_step`` counts from 0 and no rate of warm-up is 0."""
    if optimizer_step + 1 >= trainer.lr_warmup_steps:
        return trainer.lr
    return trainer.lr * (optimizer_step + 1) / trainer.lr_warmup_steps
