"""These checks refuse settings of functions of the user's own that cannot work with others."""

from __future__ import annotations

from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError

SLIMES_ROLLOUTS = "slime.rollout."
SLIMES_DEFAULT = "slime.rollout.sglang_rollout.generate_rollout"
SLIMES_SFT = "slime.rollout.sft_rollout.generate_rollout"


def check_custom(config: Config) -> None:
    """Raise ConfigError for the first contradiction; functions are not loaded."""
    _check_rollout_function(config)
    if config.custom.buffer_filter is not None and config.custom.rollout in (None, SLIMES_DEFAULT):
        raise ConfigError(
            "custom.buffer_filter",
            "chooses from the groups that a rollout function adds; without one there is no buffer, and what partial "
            "rollout left unfinished all goes on in the next step",
            config.custom.buffer_filter,
            "Leave it out, or pass --rollout-function-path.",
        )
    _check_partial_rollout(config)
    rollout = config.rollout
    least = rollout.max_prompt_len + rollout.max_response_len
    if rollout.max_context_len is not None and rollout.max_context_len < least:
        raise ConfigError(
            "rollout.max_context_len",
            f"must hold a prompt and a response: max_prompt_len + max_response_len = {least} tokens",
            rollout.max_context_len,
            "Raise --rollout-max-context-len, or lower --rollout-max-prompt-len or --rollout-max-response-len.",
        )


def check_post_process(config: Config) -> None:
    """Raise ConfigError where the trainer would estimate anew the advantages that a function gives."""
    if config.custom.reward_post_process is not None and config.algorithm.kl_coef > 0.0:
        raise ConfigError(
            "custom.reward_post_process",
            "gives the advantages, and a KL in the reward is estimated anew by the trainer, which does not know them",
            config.custom.reward_post_process,
            "Drop --kl-coef (--kl-loss-coef has the KL in the loss), or the function.",
        )


def _check_rollout_function(config: Config) -> None:
    name = config.custom.rollout
    if name is None or name == SLIMES_DEFAULT:
        return
    if name == SLIMES_SFT:
        rule, remedy = "this project trains on what the policy says, not on given texts", "Use another trainer for SFT."
        raise ConfigError("custom.rollout", rule, name, remedy)
    if name.startswith(SLIMES_ROLLOUTS):
        rule = "is slime's own and talks to slime's servers"
        remedy = "Leave it out, or name a function of your own (docs/agents.md)."
        raise ConfigError("custom.rollout", rule, name, remedy)
    for other, flag in (
        ("generate", "--custom-generate-function-path"),
        ("sample_hooks", "--rollout-sample-hook-path"),
        ("dynamic_filter", "--dynamic-sampling-filter-path"),
    ):
        if getattr(config.custom, other):
            rule = "makes the samples of a step itself, so that nothing else calls the function of " + flag
            raise ConfigError("custom.rollout", rule, name, f"Drop {flag}, or --rollout-function-path.")


def _check_partial_rollout(config: Config) -> None:
    if not config.rollout.partial_rollout:
        return
    for name, why in (
        ("generate", "a function cannot go on where an earlier call of it was broken off"),
        ("sample_hooks", "a hook sees whole samples, and a step may end with some half made"),
        ("rollout", "a rollout function decides itself what it keeps"),
        ("dynamic_filter", "partial rollout trains on the groups that end first, and a filter on the first prompts'"),
    ):
        value = getattr(config.custom, name)
        if value and value != SLIMES_DEFAULT:
            raise ConfigError(
                f"custom.{name}", f"is not for --partial-rollout: {why}", value, "Drop --partial-rollout."
            )
