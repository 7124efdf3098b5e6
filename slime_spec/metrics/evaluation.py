"""This module computes the metrics of one evaluation set's samples, named ``eval/NAME/...``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from slime_spec.metrics.proportions import Tally, accuracy, pass_at, powers_of_two
from slime_spec.metrics.rollout import rollout_metrics
from slime_spec.types import Sample

RIGHT = 1.0  # the reward of a right reply, as slime counts it; of rewards on another scale the mean alone says much
# What an evaluation says in the words of a rollout: of the same numbers, pooled over its own samples.
OF_ROLLOUT = {
    "num_samples": "rollout/num_samples",
    "num_excluded": "rollout/num_excluded",
    "response_len_mean": "rollout/response_len_mean",
    "response_len_max": "rollout/response_len_max",
    "truncated_ratio": "rollout/truncated_ratio",
    "weight_version": "rollout/weight_version_min",
    "spec_accept_rate": "rollout/spec_accept_rate",
    "spec_accept_length": "rollout/spec_accept_length",
}


def evaluation_metrics(name: str, samples: Sequence[Sample], n_samples_per_prompt: int) -> dict[str, float]:
    """Return the metrics ``eval/NAME`` and ``eval/NAME/*``; a metric without a value is absent."""
    rolled_out = rollout_metrics(samples)
    metrics = {f"eval/{name}/{own}": rolled_out[theirs] for own, theirs in OF_ROLLOUT.items() if theirs in rolled_out}
    if "rollout/reward_mean" not in rolled_out:
        return metrics
    tallies = tallies_of(samples)
    right = accuracy(tallies)
    assert right is not None, "a sample has a reward"
    of_k = {k: pass_at(k, tallies) for k in powers_of_two(n_samples_per_prompt)}
    return {
        f"eval/{name}": rolled_out["rollout/reward_mean"],
        f"eval/{name}/accuracy": right.value,
        f"eval/{name}/accuracy_low": right.low,
        f"eval/{name}/accuracy_high": right.high,
        **{f"eval/{name}/pass@{k}": share for k, share in of_k.items() if share is not None},
        **metrics,
    }


def tallies_of(samples: Sequence[Sample]) -> list[Tally]:
    """Return how many samples of each prompt have a reward, and how many of these are right."""
    by_prompt: defaultdict[int, list[float]] = defaultdict(list)
    for sample in samples:
        if sample.reward is not None:
            by_prompt[sample.prompt.prompt_id].append(sample.reward)
    return [Tally(len(rewards), sum(each == RIGHT for each in rewards)) for rewards in by_prompt.values()]


def facts(name: str, metrics: Mapping[str, float]) -> str:
    """Return a set's metrics as facts of a log line: ``reward=0.312 accuracy=0.312 (0.228 to 0.411) ...``."""
    own = {key.removeprefix(f"eval/{name}").lstrip("/"): value for key, value in metrics.items()}
    parts = []
    if "" in own:
        interval = f"({own['accuracy_low']:.3f} to {own['accuracy_high']:.3f})"
        parts = [f"reward={own['']:.3f}", f"accuracy={own['accuracy']:.3f} {interval}"]
    parts += [f"{key}={value:.3f}" for key, value in own.items() if key.startswith("pass@") and key != "pass@1"]
    parts.append(f"len={own['response_len_mean']:.1f}")
    if own["truncated_ratio"]:
        parts.append(f"truncated={own['truncated_ratio']:.0%}")
    if "spec_accept_length" in own:
        parts.append(f"accept_len={own['spec_accept_length']:.2f}")
    if own["num_excluded"]:
        parts.append(f"excluded={own['num_excluded']:.0f}")
    return " ".join(parts)
