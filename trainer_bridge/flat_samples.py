"""A flat sample is a sample whose advantages are zero: every policy loss has no gradient at its tokens.

A group whose rewards are all equal is flat as a whole where an estimator compares a prompt's samples. Flat samples need
neither a forward nor a backward pass, but they stay part of their optimizer step: the loss is a mean over all response
tokens that count, or samples, theirs included. A KL or an entropy in the loss pulls at them, too, and then none is left
out.

    rollout        [ A A A A | B B B B | C C C C | D D D D ]     B and D: equal rewards, advantage 0
    passes           A A A A             C C C C
    mean over        A A A A + B B B B + C C C C + D D D D
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from slime_spec.types import TrainSample


@dataclass(frozen=True)
class SplitBatch:
    """Holds samples of one or more optimizer steps: the ``trained`` ones and the ``flat`` ones that are left out."""

    trained: tuple[TrainSample, ...]
    flat: tuple[TrainSample, ...]

    @property
    def num_trained_tokens(self) -> int:
        return _num_loss_tokens(self.trained)

    @property
    def num_flat_tokens(self) -> int:
        return _num_loss_tokens(self.flat)

    @property
    def num_tokens(self) -> int:
        """Return the response tokens that the loss counts."""
        return self.num_trained_tokens + self.num_flat_tokens


def split_batch(samples: Sequence[TrainSample], leave_out_flat: bool) -> SplitBatch:
    """Part the samples, each side in their order; with ``leave_out_flat=False`` all are trained."""
    flat = [leave_out_flat and is_flat(sample) for sample in samples]
    return SplitBatch(
        trained=tuple(sample for sample, out in zip(samples, flat, strict=True) if not out),
        flat=tuple(sample for sample, out in zip(samples, flat, strict=True) if out),
    )


def is_flat(sample: TrainSample) -> bool:
    """Return whether the sample's policy-gradient loss, of whatever estimator, has no gradient whatever the policy is.

    A sample with a logprob that is not finite is not: the loss it makes has to stop the step, as ever.
    """
    return not any(sample.advantages) and all(map(math.isfinite, sample.rollout_logprobs))


def _num_loss_tokens(samples: Sequence[TrainSample]) -> int:
    return sum(sample.num_loss_tokens for sample in samples)
