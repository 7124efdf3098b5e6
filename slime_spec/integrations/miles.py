"""These are the functions that flags of miles name: ``slime_spec.integrations.miles.log_rollout`` and its like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slime_spec.integrations.framework import MILES
from slime_spec.integrations.plugin import Plugin

PLUGIN = Plugin(MILES)


async def generate(args: Any, sample: Any, sampling_params: Mapping[str, Any], evaluation: bool = False) -> Any:
    """Generate as miles does, and keep what the servers say of speculation (--custom-generate-function-path)."""
    return await PLUGIN.generate(args, sample, sampling_params, evaluation)


def log_rollout(
    rollout_id: int,
    args: Any,
    samples: Sequence[Any],
    rollout_extra_metrics: Mapping[str, Any] | None,
    rollout_time: float,
) -> bool:
    """Log a rollout, with pooled acceptance (--custom-rollout-log-function-path)."""
    return PLUGIN.log_rollout(rollout_id, args, samples, rollout_extra_metrics, rollout_time)


def log_eval(
    rollout_id: int, args: Any, data: Mapping[str, Mapping[str, Any]], extra_metrics: Mapping[str, Any] | None
) -> bool:
    """Log an evaluation, with pooled acceptance (--custom-eval-rollout-log-function-path)."""
    return PLUGIN.log_eval(rollout_id, args, data, extra_metrics)


def before_train_step(
    args: Any, rollout_id: int, step_id: int, model: Sequence[Any], optimizer: Any, opt_param_scheduler: Any
) -> None:
    """Train the servers' draft beside the policy (--custom-megatron-before-train-step-hook-path)."""
    PLUGIN.before_train_step(args, rollout_id, model)
