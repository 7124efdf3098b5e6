"""slime's logs (slime/observability/rollout_metrics.py): when it calls the user's own, and its means of ratios."""

from __future__ import annotations

from typing import Any

from slime.rollout.sglang_rollout import load_function

LOGGED: list[dict[str, Any]] = []  # in place of wandb


def _means(args: Any, samples: list[Any], prefix: str) -> dict[str, float]:
    metrics = {f"{prefix}response_len/mean": sum(each.response_length for each in samples) / len(samples)}
    if getattr(args, "sglang_speculative_algorithm", None) is not None:
        for name in ("spec_accept_rate", "spec_accept_length"):
            metrics[prefix + name] = sum(getattr(each.spec_info, name) for each in samples) / len(samples)
    return metrics


def log_rollout_data(
    rollout_id: int, args: Any, samples: list[Any], rollout_extra_metrics: dict[str, Any] | None, rollout_time: float
) -> None:
    if args.custom_rollout_log_function_path is not None:
        custom = load_function(args.custom_rollout_log_function_path)
        if custom(rollout_id, args, samples, rollout_extra_metrics, rollout_time):
            return
    if args.load_debug_rollout_data:
        return
    metrics = {**(rollout_extra_metrics or {}), **_means(args, samples, "rollout/")}
    LOGGED.append({**metrics, "perf/rollout_time": rollout_time, "rollout/step": rollout_id})


def log_eval_rollout_data(
    rollout_id: int, args: Any, data: dict[str, Any], extra_metrics: dict[str, Any] | None = None
) -> None:
    if args.custom_eval_rollout_log_function_path is not None:
        custom = load_function(args.custom_eval_rollout_log_function_path)
        if custom(rollout_id, args, data, extra_metrics):
            return
    metrics = dict(extra_metrics or {})
    for name, of_set in data.items():
        metrics[f"eval/{name}"] = sum(of_set["rewards"]) / len(of_set["rewards"])
        metrics |= _means(args, of_set["samples"], f"eval/{name}/")
    LOGGED.append({**metrics, "eval/step": rollout_id})
