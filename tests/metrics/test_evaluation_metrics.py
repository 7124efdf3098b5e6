"""The metrics of an evaluation set, from samples counted by hand."""

from __future__ import annotations

import pytest
from samples import sample

from slime_spec.metrics.evaluation import evaluation_metrics, facts
from slime_spec.metrics.table import metric


def test_a_sets_metrics_are_those_of_its_samples() -> None:
    samples = [
        sample(0, reward=1.0, length=4, histogram=(1, 1), finish_reason="stop", version=7, index=0),
        sample(0, reward=0.0, length=8, histogram=(2, 0, 1), finish_reason="length", version=7, index=1),
        sample(1, reward=0.0, length=6, version=7, index=0),
        sample(1, reward=None, length=2, version=7, index=1),
    ]
    metrics = evaluation_metrics("aime", samples, n_samples_per_prompt=2)
    assert metrics["eval/aime"] == metrics["eval/aime/accuracy"] == 1 / 3
    assert metrics["eval/aime/accuracy_low"] < 1 / 3 < metrics["eval/aime/accuracy_high"]
    assert metrics["eval/aime/pass@1"] == (1 / 2 + 0) / 2
    assert metrics["eval/aime/pass@2"] == 1.0, "prompt 1 has one scored sample, and says nothing of two"
    assert metrics["eval/aime/response_len_mean"] == 5.0
    assert metrics["eval/aime/response_len_max"] == 8.0
    assert metrics["eval/aime/truncated_ratio"] == 1 / 4
    assert metrics["eval/aime/num_samples"] == 4.0
    assert metrics["eval/aime/num_excluded"] == 1.0
    assert metrics["eval/aime/weight_version"] == 7.0
    assert metrics["eval/aime/spec_accept_length"] == (4 + 8) / (2 + 3), "sum over sum, of samples with a round"
    assert metrics["eval/aime/spec_accept_rate"] == (1 + 2) / (3 * 5)
    assert {metric(name).name.partition("/")[0] for name in metrics} == {"eval"}, "each has its row in the table"


def test_a_right_reply_has_the_reward_1_as_slime_counts_it_and_graded_rewards_have_a_mean() -> None:
    metrics = evaluation_metrics("count", [sample(0, reward=0.5), sample(1, reward=1.0), sample(2, reward=1.5)], 1)
    assert metrics["eval/count"] == 1.0
    assert metrics["eval/count/accuracy"] == metrics["eval/count/pass@1"] == 1 / 3


def test_without_any_reward_nothing_is_said_of_rewards() -> None:
    metrics = evaluation_metrics("aime", [sample(reward=None)], 1)
    assert not {"eval/aime", "eval/aime/accuracy", "eval/aime/pass@1"} & set(metrics)
    assert metrics["eval/aime/num_excluded"] == 1.0
    assert facts("aime", metrics) == "len=4.0 excluded=1"


def test_a_log_line_says_what_a_reader_looks_for_first() -> None:
    samples = [sample(i % 2, reward=float(i < 2), finish_reason="length", histogram=(1,)) for i in range(4)]
    line = facts("a", evaluation_metrics("a", samples, 2))
    assert line == "reward=0.500 accuracy=0.500 (0.150 to 0.850) pass@2=1.000 len=4.0 truncated=100% accept_len=4.00"


@pytest.mark.parametrize("name", ["eval/aime/pass@x", "eval/aime/other", "eval/a/b/accuracy"])
def test_a_name_without_a_row_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be rows of"):
        metric(name)
