"""LossMean says what the loss of an optimizer step is a mean over.

token       Σ over all tokens                      / tokens     DAPO; slime with --calculate-per-token-loss
sample      Σ over samples of their token mean     / samples    GRPO, GSPO; slime without
constant    Σ over all tokens / max_response_len   / samples    Dr. GRPO (arXiv:2503.20783)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slime_spec.config.tree import Config
from slime_spec.types import TrainSample


@dataclass(frozen=True)
class LossMean:
    """Turns tokens' losses into a mean: each times its sample's ``scale``, the sum over ``size`` of all samples."""

    kind: str = "token"
    max_response_len: int = 1

    @classmethod
    def of(cls, config: Config) -> LossMean:
        algorithm = config.algorithm
        return cls(algorithm.loss_mean or algorithm.estimator.loss_mean, config.rollout.max_response_len)

    def scale(self, sample: TrainSample) -> float:
        """Return the factor of the losses of the sample's tokens."""
        match self.kind:
            case "sample":
                return 1.0 / max(1, sample.num_loss_tokens)
            case "constant":
                return 1.0 / self.max_response_len
        return 1.0

    def size(self, samples: Sequence[TrainSample]) -> int:
        """Return what the sum over the samples is divided by."""
        if self.kind == "token":
            return sum(sample.num_loss_tokens for sample in samples)
        return len(samples)


TOKEN_MEAN = LossMean()
