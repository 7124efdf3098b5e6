"""These settings say how the trainer trains the run's draft beside the policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from slime_spec.config.setting import DRAFTS, INT32, SAMPLES, setting
from slime_spec.errors import ConfigError

TOP_K_LOSS, REPLY_LOSS = "top_k_soft_ce", "cross_entropy"
LOSSES = ("total_variation", "log_acceptance", "reverse_kl", "lk_hybrid", "soft_ce", TOP_K_LOSS, REPLY_LOSS)
TOP_K = 256
MAX_LOGITS_BYTES = 256 * 2**20  # of one tensor of logits in a draft's update, in float32
STEP_DECAY = 0.8
D_PACE = "d_pace"
POSITION_WEIGHTS = ("decay", D_PACE)
# An MTP layer ranges over the target's whole vocabulary, of which few tokens are nearly all that is ever drawn.
MTP = "mtp"
LOSS_OF_FAMILY = {MTP: TOP_K_LOSS}
LOSS_OF_OTHERS = "total_variation"


@dataclass(frozen=True)
class DraftTrainingConfig:
    """Holds the settings of ``draft_training``; the defaults are measured on EAGLE-3 drafts (docs/measurements.md)."""

    enable: bool = setting(
        False,
        "Train the draft (an EAGLE-3 or MTP layer, in a folder of its own or inside the policy's checkpoint) on each "
        "step's rollout, and push it beside the policy.",
        flags=("--enable-draft-training", "--enable-mtp-training"),
    )
    loss: str | None = setting(
        None,
        "What a row's loss is: 1 - acceptance (total_variation), -log acceptance, reverse KL, the LK hybrid "
        "(arXiv 2602.23881), soft cross-entropy, with which an untrained draft begins best, the same to the target's "
        "likeliest tokens alone (top_k_soft_ce), or cross-entropy to the reply's own tokens, slime's loss of MTP "
        "layers; default: top_k_soft_ce for an MTP layer, else total_variation.",
        flags=("--draft-loss",),
        choices=LOSSES,
    )
    loss_top_k: int = setting(
        TOP_K,
        "Tokens of the target's distribution that top_k_soft_ce learns from, the likeliest.",
        flags=("--draft-loss-top-k",),
        minimum=1,
        maximum=INT32,
    )
    loss_scale: float = setting(
        1.0,
        "Factor of the draft's loss before its gradient is clipped. The draft has an AdamW of its own, whose steps do "
        "not depend on it where nothing is clipped.",
        flags=("--mtp-loss-scaling-factor",),
        above=0.0,
        maximum=1e6,
    )
    lr: float = setting(3e-4, "Learning rate of the draft, constant.", flags=("--draft-lr",), minimum=0.0, maximum=1.0)
    clip_grad: float = setting(
        0.5,
        "Gradient norm clip of the draft, apart from the policy's.",
        flags=("--draft-clip-grad",),
        above=0.0,
        maximum=1e6,
    )
    mtp_num_layers: int | None = setting(
        None,
        "MTP layers that the run trains: 1, the layer that engines draft with at every position.",
        flags=("--mtp-num-layers",),
        minimum=1,
        maximum=INT32,
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
        STEP_DECAY,
        "Weight of a position's loss over that of the position before.",
        flags=("--draft-step-decay",),
        above=0.0,
        maximum=1.0,
    )
    position_weights: str = setting(
        "decay",
        "How a position's loss weighs: decay (step_decay), or d_pace (arXiv 2605.18810), of the loss cross_entropy: by "
        "how much longer the accepted drafts of a round would be, as the draft's own confidence says.",
        flags=("--draft-position-weights",),
        choices=POSITION_WEIGHTS,
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


# A window of fewer blocks than this would say little of the tokens at a block's end, and teach them little.
LEAST_BLOCKS = 4


def rows_of_reply(settings: DraftTrainingConfig, num_block_drafts: int) -> int:
    """Return the rows of one reply that the draft learns from; each of a block drafter's is a block of drafts."""
    if not num_block_drafts:
        return settings.max_rows
    return min(settings.max_rows, max(settings.max_rows // num_block_drafts, LEAST_BLOCKS * num_block_drafts))


def loss_for(settings: DraftTrainingConfig, family: str) -> str:
    """Return the loss with which a draft of a family learns."""
    return settings.loss or LOSS_OF_FAMILY.get(family, LOSS_OF_OTHERS)


def check_loss(settings: DraftTrainingConfig, family: str) -> None:
    """Raise ConfigError for a setting that the loss of a draft of this family does not read."""
    check_loss_settings(loss_for(settings, family), settings, "draft_training.{}".format, "--draft-loss")


class LossSettings(Protocol):
    """Holds what some losses read beside their name."""

    @property
    def loss_top_k(self) -> int: ...
    @property
    def position_weights(self) -> str: ...
    @property
    def step_decay(self) -> float: ...


def check_loss_settings(loss: str, settings: LossSettings, named: Callable[[str], str], flag: str) -> None:
    """Raise ConfigError for a setting that ``loss`` does not read.

    ``named`` is how the user knows a field of ``settings``, ``flag`` what chooses the loss.
    """
    if loss != TOP_K_LOSS and settings.loss_top_k != TOP_K:
        rule, remedy = f"has no effect on the loss {loss}", f"Pass {flag} {TOP_K_LOSS}, or leave it out."
        raise ConfigError(named("loss_top_k"), rule, settings.loss_top_k, remedy)
    if settings.position_weights != D_PACE:
        return
    if loss != REPLY_LOSS:
        rule = f"are of the loss {REPLY_LOSS}, and this draft learns by {loss}"
        remedy = f"Pass {flag} {REPLY_LOSS}, or leave it out."
        raise ConfigError(named("position_weights"), rule, D_PACE, remedy)
    if settings.step_decay != STEP_DECAY:
        rule = f"has no effect beside position_weights {D_PACE}"
        raise ConfigError(named("step_decay"), rule, settings.step_decay, "Leave one of them out.")
