"""These rows of the table of metrics are those of evaluation sets."""

from __future__ import annotations

from slime_spec.metrics.metric import Metric

EVALUATION_ROWS = (
    Metric(
        "eval/{set}",
        "reward",
        "Mean reward of an evaluation set's scored samples, by the weights that the step generates with: before its "
        "update. The row after the last step's has the evaluation at the end.",
    ),
    Metric("eval/{set}/accuracy", "share", "Samples with a reward of 1, over scored samples."),
    Metric(
        "eval/{set}/accuracy_low",
        "share",
        "Lower end of the 95 % interval of accuracy over prompts like these: Wilson's, at the effective number of "
        "samples where a prompt has several, which are alike (evaluation.md).",
    ),
    Metric("eval/{set}/accuracy_high", "share", "Its upper end."),
    Metric(
        "eval/{set}/pass@{k}",
        "share",
        "Probability that one of k samples of a prompt is right: the unbiased estimate of all its samples, mean over "
        "the prompts with k scored samples; for powers of two up to --n-samples-per-eval-prompt.",
    ),
    Metric("eval/{set}/response_len_mean", "tokens", "Mean response length of the set's samples."),
    Metric("eval/{set}/response_len_max", "tokens", "Longest response."),
    Metric("eval/{set}/truncated_ratio", "share", "Responses cut at their longest length, over all responses."),
    Metric("eval/{set}/num_samples", "samples", "Samples generated for the set."),
    Metric("eval/{set}/num_excluded", "samples", "Samples without a reward, which count in no mean."),
    Metric("eval/{set}/weight_version", "version", "Weights that were evaluated."),
    Metric(
        "eval/{set}/spec_accept_rate",
        "share",
        "rollout/spec_accept_rate of the set's samples alone; an evaluation counts in no rollout/* and no spec/*.",
    ),
    Metric("eval/{set}/spec_accept_length", "tokens/round", "rollout/spec_accept_length of the set's samples alone."),
)
