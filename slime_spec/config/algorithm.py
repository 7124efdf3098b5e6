"""These settings are the constants of the policy loss."""

from __future__ import annotations

from dataclasses import dataclass

from slime_spec.config.setting import setting


@dataclass(frozen=True)
class AlgorithmConfig:
    """Holds the settings of ``algorithm``."""

    normalize_std: bool = setting(
        True,
        "Divide a group's advantages by its sample standard deviation (n - 1), as slime.",
        flags=("--grpo-std-normalization",),
    )
    eps_clip: float = setting(0.2, "Lower clip of the importance ratio.", above=0.0, maximum=1.0)
    eps_clip_high: float | None = setting(None, "Upper clip of the ratio; default: eps_clip.", above=0.0, maximum=100.0)
    kl_loss_coef: float = setting(
        0.0,
        "Weight of the KL to the reference (the initial checkpoint); 0: no reference.",
        minimum=0.0,
        maximum=1000.0,
    )
