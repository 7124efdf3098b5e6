"""The table of slime's flags that are accepted and change nothing, each with the reason and the values it may have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slime_spec.errors import ConfigError

WANDB_KEY = "--wandb-key"
# Each reason completes the sentence "No effect, as REASON: --optimizer adam."
ANYWAY = "it is what this project does anyway"
PACKED = "microbatches are packed by tokens without padding, and --max-tokens-per-gpu bounds them"
OWN_LOGPROBS = "the importance ratio is against the rollout's own logprobs, or with --use-tis the trainer's"
KERNELS = "it changes the trainer's memory or time, not what it computes, and is no choice here"
CONFIG_JSON = "the model's shape is read from its config.json"
WATCHED = "engines are always watched and replaced; --sglang-stall-timeout says when one hangs"
PUSHED = "--push-transport says how weights go to the engines"
NO_CRITIC = "no critic is trained"
SLIMES_SOURCES = ("RolloutDataSourceWithBuffer", "RolloutDataSource")
NO_SEQUENCE_RANKS = (
    "a rank attends to the keys and values that it has, and ranks that share a sequence would need each other's; "
    "split long samples' memory by --tensor-model-parallel-size and --recompute-activations"
)


@dataclass(frozen=True)
class WithoutEffect:
    """Describes a flag that changes nothing at the values it may have.

    ``num_values`` is a Flag's: "0" for a switch. Without ``values`` any value is taken; with them any other is refused,
    and ``remedy`` says what to do then.

    Example: ``WithoutEffect(ANYWAY, "1", ("adam",), "Pass --optimizer adam, or nothing.")``
    """

    reason: str
    num_values: str = "0"
    values: tuple[str, ...] = ()
    remedy: str = "Leave it out."

    def check(self, name: str, texts: Sequence[str]) -> None:
        """Raise ConfigError where the flag is given a value that this project does not do."""
        if self.num_values == "0" and texts[0] == "false":
            raise ConfigError(name, f"cannot be switched off: {self.reason}", False, self.remedy)
        if self.values and texts[0] not in self.values:
            raise ConfigError(name, f"must be {' or '.join(self.values)}, the one choice here", texts[0], self.remedy)


def _one(value: str, *others: str, why: str = ANYWAY, remedy: str = "Leave it out.") -> WithoutEffect:
    return WithoutEffect(why, "1", (value, *others), remedy)


_DROPOUT = _one("0.0", "0", remedy="Pass 0.0: with dropout the trainer's logprobs would not be the engines'.")
_BALANCED = _one("0", "0.0", remedy="Pass 0: no loss balances the experts, the policy's loss alone decides.")
_SWITCH_ANYWAY, _SWITCH_KERNELS = WithoutEffect(ANYWAY), WithoutEffect(KERNELS)
_VALUE_KERNELS = WithoutEffect(KERNELS, "1")

WITHOUT_EFFECT: Mapping[str, WithoutEffect] = {
    "--train-backend": _one("megatron"),
    "--loss-type": _one("policy_loss", remedy="Pass policy_loss: a policy learns from its own replies here, no SFT."),
    "--optimizer": _one("adam", remedy="Pass adam: updates are AdamW's."),
    "--attention-dropout": _DROPOUT,
    "--hidden-dropout": _DROPOUT,
    "--accumulate-allreduce-grads-in-fp32": _SWITCH_ANYWAY,
    "--attention-softmax-in-fp32": _SWITCH_ANYWAY,
    "--disable-wandb-random-suffix": _SWITCH_ANYWAY,
    "--moe-router-dtype": _one("fp32"),
    "--moe-token-drop-policy": WithoutEffect("no token is dropped", "1"),
    "--moe-aux-loss-coeff": _BALANCED,
    "--moe-router-bias-update-rate": _BALANCED,
    "--moe-router-load-balancing-type": WithoutEffect("no loss balances the experts", "1"),
    "--no-check-for-nan-in-loss-and-grad": WithoutEffect("a loss or gradient that is not finite always stops a step"),
    "--context-parallel-size": _one("1", remedy=f"Pass 1: {NO_SEQUENCE_RANKS}."),
    "--allgather-cp": WithoutEffect("no ranks share a sequence"),
    "--use-dynamic-batch-size": WithoutEffect(PACKED),
    "--micro-batch-size": WithoutEffect(PACKED, "1"),
    "--data-pad-size-multiplier": WithoutEffect(PACKED, "1"),
    "--log-probs-max-tokens-per-gpu": WithoutEffect(PACKED, "1"),
    "--balance-data": WithoutEffect(PACKED),
    "--balance-by-flops": WithoutEffect(PACKED),
    "--use-rollout-logprobs": WithoutEffect(OWN_LOGPROBS),
    "--use-routing-replay": WithoutEffect(f"{OWN_LOGPROBS}; --use-rollout-routing-replay replays the engine's experts"),
    "--log-passrate": WithoutEffect("pass@k is always among eval/NAME/*"),
    "--use-fault-tolerance": WithoutEffect(WATCHED),
    "--rollout-health-check-first-wait": WithoutEffect(WATCHED, "1"),
    "--update-weight-mode": _one("full", why=PUSHED, remedy="Pass full: a push carries whole tensors."),
    "--update-weight-transport": _one(
        "nccl", "ray", why=PUSHED, remedy="Leave it out: --push-transport and --sglang-weight-transport (disk) choose."
    ),
    "--keep-old-actor": WithoutEffect(OWN_LOGPROBS),
    "--use-rollout-entropy": WithoutEffect("the entropy is always measured by the pass that trains (train/entropy)"),
    "--log-multi-turn": WithoutEffect("turns are always counted where a function makes them (rollout/turns_mean)"),
    "--wandb-always-use-train-step": _SWITCH_ANYWAY,
    "--value-clip": WithoutEffect(NO_CRITIC, "1"),
    "--lambd": WithoutEffect(NO_CRITIC, "1"),
    "--num-critic-only-steps": _one("0", why=NO_CRITIC, remedy="Pass 0."),
    "--rollout-skip-special-tokens": WithoutEffect("a reply's text never has special tokens"),
    "--rollout-data-transport": _one("object-store", remedy="Pass object-store: samples go through Ray."),
    "--use-distributed-post": WithoutEffect("each engine is asked by a process of its own"),
    "--eval-function-path": _one(
        "slime.rollout.sglang_rollout.generate_rollout",
        remedy="Leave it out: engines, or the function of --custom-generate-function-path, answer evaluations too.",
    ),
    "--data-source-path": _one(
        *(f"slime.rollout.data_source.{name}" for name in SLIMES_SOURCES),
        remedy="Leave it out: --prompt-data names a file, --task module:object prompts that code makes.",
    ),
    "--eval-min-new-tokens": _one("0", remedy="Pass 0: a reply may end at once."),
    "--async-save": WithoutEffect("a checkpoint is whole before the next step begins"),
    "--no-save-optim": WithoutEffect("a checkpoint has the optimizer's states, so that a resumed run is the same run"),
    "--distributed-backend": WithoutEffect("ranks talk by NCCL on GPUs and by gloo on CPUs", "1"),
    "--distributed-timeout-minutes": WithoutEffect("ranks wait for each other as long as torch does", "1"),
    "--megatron-to-hf-mode": WithoutEffect("checkpoints are read and written as Hugging Face's", "1"),
    WANDB_KEY: WithoutEffect("it is a key, which only a run hands on", "?"),
    "--attention-backend": _VALUE_KERNELS,
    "--transformer-impl": _VALUE_KERNELS,
    "--recompute-method": _VALUE_KERNELS,
    "--recompute-num-layers": _VALUE_KERNELS,
    "--recompute-loss-function": _SWITCH_KERNELS,
    "--log-probs-chunk-size": _VALUE_KERNELS,
    "--moe-token-dispatcher-type": _VALUE_KERNELS,
    "--moe-enable-deepep": _SWITCH_KERNELS,
    "--moe-grouped-gemm": _SWITCH_KERNELS,
    "--moe-permute-fusion": _SWITCH_KERNELS,
    "--sequence-parallel": _SWITCH_KERNELS,
    "--no-gradient-accumulation-fusion": _SWITCH_KERNELS,
    "--no-masked-softmax-fusion": _SWITCH_KERNELS,
    "--no-rope-fusion": _SWITCH_KERNELS,
    "--enable-experimental": _SWITCH_KERNELS,
    "--overlap-cpu-optimizer-d2h-h2d": _SWITCH_KERNELS,
    "--use-precision-aware-optimizer": _SWITCH_KERNELS,
}
