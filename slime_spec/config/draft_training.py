"""These settings say how the trainer trains the run's draft beside the policy."""

from __future__ import annotations

from dataclasses import dataclass

from slime_spec.config.setting import DRAFTS, INT32, SAMPLES, setting

LOSSES = ("total_variation", "log_acceptance", "reverse_kl", "lk_hybrid", "soft_ce")


@dataclass(frozen=True)
class DraftTrainingConfig:
    """Holds the settings of ``draft_training``; the defaults are measured (docs/measurements.md)."""

    enable: bool = setting(
        False,
        "Train the draft (an EAGLE-3 or MTP layer, in a folder of its own or inside the policy's checkpoint) on each "
        "step's rollout, and push it beside the policy.",
        flags=("--enable-draft-training", "--enable-mtp-training"),
    )
    loss: str = setting(
        "total_variation",
        "What a row's loss is: 1 - acceptance (total_variation), -log acceptance, reverse KL, the LK hybrid "
        "(arXiv 2602.23881), or soft cross-entropy, with which an untrained draft begins best.",
        flags=("--draft-loss",),
        choices=LOSSES,
    )
    lr: float = setting(3e-4, "Learning rate of the draft, constant.", flags=("--draft-lr",), minimum=0.0, maximum=1.0)
    clip_grad: float = setting(
        0.5,
        "Gradient norm clip of the draft, apart from the policy's.",
        flags=("--draft-clip-grad",),
        above=0.0,
        maximum=1e6,
    )
    update_policy: str = setting(
        "every",
        "When the draft is trained and pushed: every update_interval steps, or when_it_pays: where the rollouts of the "
        "next update_horizon steps are expected to save more than an update takes.",
        flags=("--draft-update-policy",),
        choices=("every", "when_it_pays"),
    )
    update_interval: int = setting(
        1,
        "Steps from an update to the next, of the policy every.",
        flags=("--draft-update-interval",),
        minimum=1,
        maximum=INT32,
    )
    update_horizon: int = setting(
        10,
        "Steps in which an update must earn what it takes, of the policy when_it_pays.",
        flags=("--draft-update-horizon",),
        minimum=1,
        maximum=INT32,
    )
    num_optimizer_steps: int = setting(
        4, "Optimizer steps of the draft in an update.", flags=("--draft-optimizer-steps",), minimum=1, maximum=SAMPLES
    )
    batch_size: int = setting(
        16, "Replies of one optimizer step of the draft.", flags=("--draft-batch-size",), minimum=1, maximum=SAMPLES
    )
    num_steps: int = setting(
        3,
        "Draft positions that the training unrolls, each from the draft's own states before it.",
        flags=("--draft-ttt-length",),
        minimum=1,
        maximum=DRAFTS,
    )
    step_decay: float = setting(
        0.8,
        "Weight of a position's loss over that of the position before.",
        flags=("--draft-step-decay",),
        above=0.0,
        maximum=1.0,
    )
    max_rows: int = setting(
        512,
        "Tokens of one reply that the draft learns from; of a longer reply a window is drawn.",
        flags=("--draft-max-rows",),
        minimum=1,
        maximum=INT32,
    )
    max_length: int = setting(
        2048,
        "Tokens that the draft sees of one reply, prompt included, up to its window's end: the trainer keeps the "
        "hidden states of so many for each reply of a step.",
        flags=("--draft-max-length",),
        minimum=2,
        maximum=INT32,
    )
    dtype: str = setting(
        "bfloat16",
        "Compute dtype of the draft's training; its weights and moments are float32.",
        flags=("--draft-train-dtype",),
        choices=("bfloat16", "float32"),
    )
