"""These settings choose the advantage estimator and the policy loss, and give their constants.

docs/algorithms.md has their formulas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slime_spec.config.setting import setting


@dataclass(frozen=True)
class Estimator:
    """Says what belongs to an estimator beside its advantages, which are in slime_spec.rl.estimators.

    ``policy_loss`` is a name of trainer_bridge.policy_loss, ``loss_mean`` the mean of the paper (AlgorithmConfig).
    ``compares_samples`` of a prompt: one sample alone has no advantage then.
    """

    policy_loss: str = "clipped"
    loss_mean: str = "token"
    compares_samples: bool = True


ESTIMATORS: Mapping[str, Estimator] = {
    "grpo": Estimator(),
    "dr_grpo": Estimator(loss_mean="constant"),
    "gspo": Estimator(policy_loss="sequence_clipped", loss_mean="sample"),
    "cispo": Estimator(policy_loss="cispo"),
    "rloo": Estimator(),
    "reinforce_plus_plus": Estimator(compares_samples=False),
    "reinforce_plus_plus_baseline": Estimator(),
}
LOSS_MEANS = ("token", "sample", "constant")
KL_TYPES = ("k1", "k2", "k3", "low_var_kl")
TIS_MODES = ("truncate", "mask")


@dataclass(frozen=True)
class AlgorithmConfig:
    """Holds the settings of ``algorithm``."""

    advantage_estimator: str = setting(
        "grpo", "How rewards become advantages, and the policy loss that goes with it.", choices=tuple(ESTIMATORS)
    )
    normalize_std: bool = setting(
        True,
        "Divide a group's advantages by its sample standard deviation (n - 1), as slime: of grpo, gspo and cispo.",
        flags=("--grpo-std-normalization",),
    )
    normalize_advantages: bool = setting(
        False,
        "Whiten advantages over the rollout's response tokens: mean 0, variance 1. reinforce_plus_plus and its "
        "baseline always do.",
    )
    gamma: float = setting(1.0, "Discount of later tokens' rewards, of reinforce_plus_plus.", minimum=0.0, maximum=1.0)
    loss_mean: str | None = setting(
        None,
        "The loss is a mean over: token (all response tokens), sample (samples, of each sample's token mean; slime "
        "without --calculate-per-token-loss), constant (samples, of each token sum over max_response_len; Dr. GRPO). "
        "Default: the estimator's own, token for all but gspo (sample) and dr_grpo (constant).",
        choices=LOSS_MEANS,
    )
    eps_clip: float = setting(0.2, "Lower clip of the importance ratio.", above=0.0, maximum=1.0)
    eps_clip_high: float | None = setting(None, "Upper clip of the ratio; default: eps_clip.", above=0.0, maximum=100.0)
    eps_clip_c: float | None = setting(
        None,
        "Dual clip: where the advantage is negative, a token's loss is at most this times its size. Default: none.",
        above=1.0,
        maximum=1000.0,
    )
    use_kl_loss: bool = setting(False, "Measure the KL to the reference (train/kl_loss), also where kl_loss_coef is 0.")
    kl_loss_coef: float = setting(
        0.0,
        "Weight of the KL to the reference (trainer.ref_load) in the loss; 0: not in the loss.",
        minimum=0.0,
        maximum=1000.0,
    )
    kl_coef: float = setting(
        0.0,
        "Weight of the KL to the reference that is subtracted from rewards, before advantages; 0: none.",
        minimum=0.0,
        maximum=1000.0,
    )
    kl_loss_type: str | None = setting(
        None, "Estimate of the KL by token. Default: k3 in the loss, k1 in rewards.", choices=KL_TYPES
    )
    entropy_coef: float = setting(
        0.0, "Weight of the entropy bonus, which the loss subtracts.", minimum=0.0, maximum=1000.0
    )
    use_tis: bool = setting(
        False,
        "Truncated importance sampling: clip the ratio to the trainer's own logprobs before the rollout's updates, and "
        "weight each token by trainer over rollout probability. Without, the ratio to the rollout's logprobs has both.",
    )
    tis_mode: str = setting(
        "truncate",
        "What becomes of weights outside of tis_clip_low and tis_clip: truncate to the bound, or mask (no gradient).",
        choices=TIS_MODES,
    )
    tis_clip: float = setting(2.0, "Largest weight of use_tis.", above=0.0, maximum=1e6)
    tis_clip_low: float = setting(0.0, "Smallest weight of use_tis.", minimum=0.0, maximum=1e6)

    @property
    def estimator(self) -> Estimator:
        return ESTIMATORS[self.advantage_estimator]

    @property
    def needs_reference(self) -> bool:
        """Return whether the trainer keeps the reference model beside the policy."""
        return self.kl_coef > 0.0 or self.measures_kl

    @property
    def measures_kl(self) -> bool:
        """Return whether each pass of the policy has the reference's beside it."""
        return self.use_kl_loss or self.kl_loss_coef > 0.0

    @property
    def moves_at_advantage_0(self) -> bool:
        """Return whether the loss has a gradient at samples whose advantages are all 0."""
        return self.kl_loss_coef > 0.0 or self.entropy_coef > 0.0
