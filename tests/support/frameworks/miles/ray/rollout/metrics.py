"""miles' logs (miles/ray/rollout/metrics.py): the same calls as slime's, from another place."""

from slime.observability.rollout_metrics import LOGGED, log_eval_rollout_data, log_rollout_data

__all__ = ["LOGGED", "log_eval_rollout_data", "log_rollout_data"]
