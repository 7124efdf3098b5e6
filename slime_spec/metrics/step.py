"""This module gives the metrics of training, the push and the clock for one step, under the table's names."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from slime_spec.types import DraftReport, Sample, TisReport, TrainReport
from slime_spec.weights.run import PushReport


def train_metrics(report: TrainReport) -> dict[str, float]:
    """Return the metrics ``train/*``; those that are not of every step are absent where they are None."""
    of_some_steps = {
        "train/entropy": report.entropy,
        "train/train_rollout_logprob_abs_diff": report.train_rollout_logprob_abs_diff,
        "train/routing_disagreement": report.routing_disagreement,
        "train/reward_kl": report.reward_kl,
        "train/lr": report.lr,
    }
    return {
        "train/loss": report.loss,
        "train/pg_loss": report.pg_loss,
        "train/kl_loss": report.kl,
        "train/grad_norm": report.grad_norm,
        "train/clip_fraction": report.clip_fraction,
        **{name: value for name, value in of_some_steps.items() if value is not None},
        "train/num_tokens": float(report.num_tokens),
        "train/trained_token_share": report.num_trained_tokens / report.num_tokens,
        "train/num_optimizer_steps": float(report.num_optimizer_steps),
        "train/num_microbatches": float(report.num_microbatches),
        **({} if report.tis is None else tis_metrics(report.tis)),
        **({} if report.draft is None else draft_metrics(report.draft)),
    }


def tis_metrics(report: TisReport) -> dict[str, float]:
    """Return what truncated importance sampling did, under slime's names."""
    return {
        "train/tis": report.ratio,
        "train/tis_clipfrac": report.clip_fraction,
        "train/tis_abs": report.abs_distance,
    }


def draft_metrics(report: DraftReport) -> dict[str, float]:
    """Return what training the draft was, ``train/draft_*``."""
    return {
        "train/draft_loss": report.loss,
        **({} if report.grad_norm is None else {"train/draft_grad_norm": report.grad_norm}),
        **{f"train/draft_accept_pos_{i}": value for i, value in enumerate(report.acceptance)},
        **{f"train/draft_accuracy_pos_{i}": value for i, value in enumerate(report.accuracy)},
        **{f"train/draft_accept_length/{rule}": value for rule, value in report.tokens_per_round.items()},
        "train/draft_updates": float(report.num_updates),
        "train/draft_skipped_updates": float(report.num_skipped),
        "perf/draft_train_time": report.seconds,
    }


def push_metrics(report: PushReport) -> dict[str, float]:
    """Return the metrics ``sync/*``.

    ``checksum_ok`` where weights were read back, ``paused_s`` where engines paused.
    """
    verified = {"sync/checksum_ok": 1.0, "sync/verify_seconds": report.verify_s} if report.verified else {}
    paused = {"sync/paused_s": report.paused_s} if report.paused_s else {}
    return {
        "sync/seconds": report.seconds,
        "sync/bytes": float(report.nbytes),
        "sync/bytes_per_s": report.nbytes / report.seconds,
        "sync/tensors": float(report.num_tensors),
        **verified,
        **paused,
        "sync/weight_version": float(report.version),
    }


def draft_update_metrics(updates: bool, saving_s: float, cost_s: float) -> dict[str, float]:
    """Return the metrics of the decision whether the draft is updated."""
    return {
        "spec/draft_update": float(updates),
        "spec/draft_update_saving": saving_s,
        "spec/draft_update_cost": cost_s,
    }


def draft_push_metrics(report: PushReport | None) -> dict[str, float]:
    """Return the metrics of a draft's push, None for one that failed."""
    if report is None:
        return {"sync/draft_pushed": 0.0}
    return {"sync/draft_pushed": 1.0, "sync/draft_bytes": float(report.nbytes)}


def perf_metrics(samples: Sequence[Sample], phase_s: Mapping[str, float], total_s: float) -> dict[str, float]:
    """Return the metrics ``perf/*`` from the seconds of each phase ("rollout", "train", "sync") and of the step."""
    metrics = {f"perf/{phase}_time": seconds for phase, seconds in phase_s.items()}
    metrics["perf/step_time"] = total_s
    if not samples:
        return metrics
    latencies_s = [sample.response.e2e_latency_s for sample in samples]
    metrics["perf/request_latency_mean"] = statistics.fmean(latencies_s)
    metrics["perf/request_latency_max"] = max(latencies_s)
    if rollout_s := phase_s.get("rollout"):
        metrics["perf/tokens_per_s"] = sum(sample.response.num_generated_tokens for sample in samples) / rollout_s
    if train_s := phase_s.get("train"):
        scored = [sample for sample in samples if sample.reward is not None]
        num_tokens = sum(len(sample.prompt.token_ids) + len(sample.response.token_ids) for sample in scored)
        metrics["perf/train_tokens_per_s"] = num_tokens / train_s
    return metrics
