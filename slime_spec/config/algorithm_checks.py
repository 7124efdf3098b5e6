"""These checks refuse settings of the algorithm, the batch and the learning rate that cannot work together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from slime_spec.config.algorithm import AlgorithmConfig
from slime_spec.config.tree import Config, TrainerConfig
from slime_spec.errors import ConfigError
from slime_spec.types import is_greedy

SLIMES_KL_TYPE = "k1"  # slime's default, which --config slime sets whether there is a KL or not
WHITENED = ("reinforce_plus_plus", "reinforce_plus_plus_baseline")


def check_algorithm(config: Config) -> None:
    """Raise ConfigError for the first contradiction of a run that trains."""
    algorithm = config.algorithm
    if algorithm.kl_coef > 0.0 and algorithm.kl_loss_coef > 0.0:
        raise ConfigError(
            "algorithm.kl_coef",
            f"and algorithm.kl_loss_coef ({algorithm.kl_loss_coef:g}) are two ways to one end: a KL in rewards, or in "
            "the loss",
            algorithm.kl_coef,
            "Drop --kl-coef, or --kl-loss-coef.",
        )
    if algorithm.tis_clip_low > algorithm.tis_clip:
        raise ConfigError(
            "algorithm.tis_clip_low",
            f"must not be above tis_clip ({algorithm.tis_clip:g})",
            algorithm.tis_clip_low,
            "Pass --tis-clip-low 0.5 --tis-clip 2.0.",
        )
    reference = config.trainer.ref_load
    begins_elsewhere = reference is not None and Path(reference).resolve() != Path(config.model.hf_checkpoint).resolve()
    if begins_elsewhere and not algorithm.needs_reference:
        raise ConfigError(
            "trainer.ref_load",
            "is the reference of a KL, which this run does not measure, and the policy begins with model.hf_checkpoint",
            reference,
            "Drop --ref-load, or pass --use-kl-loss; pass the weights to begin with as --hf-checkpoint.",
        )
    _check_learning_rate(config)


def check_learning_signal(config: Config) -> None:
    """Raise ConfigError where every advantage would be zero, or samples would not be the policy's."""
    rollout, name = config.rollout, config.algorithm.advantage_estimator
    if rollout.n_samples_per_prompt == 1 and config.algorithm.estimator.compares_samples:
        raise ConfigError(
            "rollout.n_samples_per_prompt",
            f"the estimator {name} compares a prompt's samples, and one sample's advantage is always zero",
            rollout.n_samples_per_prompt,
            "Pass --n-samples-per-prompt 2 or more, --advantage-estimator reinforce_plus_plus, or "
            "--debug-rollout-only.",
        )
    if is_greedy(rollout.temperature):
        raise ConfigError(
            "rollout.temperature",
            "greedy samples of a prompt are all the same, and tell nothing about other replies",
            rollout.temperature,
            "Pass --rollout-temperature 1.0, or --debug-rollout-only.",
        )


def check_batch(config: Config) -> None:
    """Raise ConfigError where optimizer steps do not divide a rollout evenly."""
    num_samples = config.rollout.batch_size * config.rollout.n_samples_per_prompt
    per_step, num_steps = config.trainer.global_batch_size, config.trainer.num_steps_per_rollout
    if num_steps is not None and num_samples % num_steps:
        raise ConfigError(
            "trainer.num_steps_per_rollout",
            f"must divide the rollout's batch_size * n_samples_per_prompt = {num_samples}",
            num_steps,
            "Pass --num-steps-per-rollout 1, or another batch.",
        )
    if per_step is not None and num_samples % per_step:
        raise ConfigError(
            "trainer.global_batch_size",
            f"must divide the rollout's batch_size * n_samples_per_prompt = {num_samples}",
            per_step,
            f"Pass --global-batch-size {num_samples}, or leave it out for one optimizer step per rollout.",
        )
    if num_steps is not None and per_step is not None and per_step * num_steps != num_samples:
        raise ConfigError(
            "trainer.num_steps_per_rollout",
            f"and global_batch_size ({per_step}) disagree on a rollout of {num_samples} samples",
            num_steps,
            "Drop --global-batch-size.",
        )


def algorithm_notes(algorithm: AlgorithmConfig, trainer: TrainerConfig) -> Iterator[str]:
    """Yield notes on settings that have no effect, or are far from what the estimator's paper has."""
    name, default = algorithm.advantage_estimator, AlgorithmConfig()
    if algorithm.gamma != default.gamma and name != "reinforce_plus_plus":
        yield f"The estimator {name} does not discount, and --gamma has no effect."
    if name in WHITENED and not algorithm.normalize_std:
        yield f"The estimator {name} whitens in any case, and --disable-grpo-std-normalization has no effect."
    tis = ("tis_mode", "tis_clip", "tis_clip_low")
    if not algorithm.use_tis and any(getattr(algorithm, each) != getattr(default, each) for each in tis):
        yield "Without --use-tis, --tis-clip, --tis-clip-low and --tis-mode have no effect."
    if algorithm.kl_loss_type not in (None, SLIMES_KL_TYPE) and not algorithm.needs_reference:
        yield "No KL to the reference is computed, and --kl-loss-type has no effect."
    if algorithm.kl_loss_type == "k1" and algorithm.kl_loss_coef > 0.0:
        yield "The gradient of k1 as a loss is noise around 0: k2, k3 and low_var_kl pull to the reference."
    if name == "gspo" and algorithm.eps_clip >= 0.1:
        yield (
            f"GSPO clips the ratio of a whole sequence, which hardly leaves 1 ± {algorithm.eps_clip:g}: its paper has "
            "--eps-clip 3e-4 --eps-clip-high 4e-4."
        )
    if name == "cispo" and algorithm.eps_clip_c is not None:
        yield "CISPO clips a weight that has no gradient, and --eps-clip-c has no effect."
    if name == "cispo" and algorithm.eps_clip < 1.0:
        yield "CISPO's paper has no lower bound of the ratio: pass --eps-clip 1.0 and choose --eps-clip-high."
    no_decay = trainer.lr_decay_style == "constant"
    if no_decay and (trainer.min_lr or (trainer.lr_decay_iters and trainer.lr_warmup_fraction is None)):
        yield "The learning rate does not decay, and --min-lr and --lr-decay-iters have no effect."


def _check_learning_rate(config: Config) -> None:
    trainer = config.trainer
    if trainer.lr_warmup_fraction is not None and trainer.lr_warmup_steps:
        raise ConfigError(
            "trainer.lr_warmup_fraction",
            f"and lr_warmup_steps ({trainer.lr_warmup_steps}) are two lengths of one warm-up",
            trainer.lr_warmup_fraction,
            "Drop --lr-warmup-iters, or --lr-warmup-fraction.",
        )
    if trainer.lr_decay_style == "constant":
        return
    if trainer.min_lr > trainer.lr:
        raise ConfigError(
            "trainer.min_lr",
            f"must not be above trainer.lr ({trainer.lr:g}), from which the rate falls",
            trainer.min_lr,
            "Lower --min-lr.",
        )
    if trainer.lr_warmup_steps >= config.num_decay_steps:
        raise ConfigError(
            "trainer.lr_warmup_steps",
            f"must be below the {config.num_decay_steps} optimizer steps after which the rate is min_lr",
            trainer.lr_warmup_steps,
            "Lower --lr-warmup-iters, or raise --lr-decay-iters or --num-rollout.",
        )
