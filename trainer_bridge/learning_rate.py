"""LearningRate is the schedule of Megatron's OptimizerParamScheduler, in optimizer steps.

lr      _______
       /       \\___           linear or cosine decay, to min_lr at the last step
0     /            \\___ min_lr
      warm-up        lr_decay_iters
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from slime_spec.config.tree import Config


@dataclass(frozen=True)
class LearningRate:
    """Gives the rate of each optimizer step: ``LearningRate.of(config)(optimizer_step=0)``.

    After warm-up it is Megatron's at the same step. In warm-up it is Megatron's a step later: there the first step
    has a rate of 0, and is lost.
    """

    largest: float
    least: float
    style: str
    num_warmup_steps: float
    num_decay_steps: int

    @classmethod
    def of(cls, config: Config) -> LearningRate:
        trainer, num_decay_steps = config.trainer, config.num_decay_steps
        fraction = trainer.lr_warmup_fraction
        warmup = float(trainer.lr_warmup_steps) if fraction is None else fraction * num_decay_steps
        return cls(trainer.lr, trainer.min_lr, trainer.lr_decay_style, warmup, num_decay_steps)

    def __call__(self, optimizer_step: int) -> float:
        """Return the rate of the step, which counts from 0."""
        if optimizer_step + 1 < self.num_warmup_steps:
            return self.largest * (optimizer_step + 1) / self.num_warmup_steps
        if self.style == "constant":
            return self.largest
        decaying = max(0.0, optimizer_step - self.num_warmup_steps)
        share = min(1.0, decaying / (self.num_decay_steps - self.num_warmup_steps))
        left = 1.0 - share if self.style == "linear" else 0.5 * (math.cos(math.pi * share) + 1.0)
        return self.least + left * (self.largest - self.least)
