"""The part on flat groups: which groups it makes flat, what it times, and whether it would see weights that differ."""

from dataclasses import replace

import pytest

from slime_spec.bench.flat_groups import (
    Compared,
    StepTimes,
    compared_weights,
    one_thread,
    rollout,
    saving_rows,
    step_times,
    weight_rows,
    with_flat_share,
)
from slime_spec.bench.timing import Timed
from slime_spec.config.tree import Config, RolloutConfig
from slime_spec.launch.compose import compose
from slime_spec.types import TrainReport, TrainSample
from tests.support.tiny_policy import make_tiny_policy


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = make_tiny_policy(tmp_path_factory.mktemp("policy"))
    composed = compose(["--config", "smollm2-135m", "--hf-checkpoint", str(folder), "--speculative-algorithm", "NONE"])
    shape = RolloutConfig(batch_size=4, n_samples_per_prompt=2, max_response_len=6)
    return one_thread(replace(composed, rollout=shape))


@pytest.fixture(scope="module")
def groups(config: Config) -> list[list[TrainSample]]:
    return rollout(config, seed=0)


def group(first: int, length: int) -> list[TrainSample]:
    return [TrainSample((first, *range(length)), 1, (-1.0,) * length, 0.5) for _ in range(2)]


def test_the_groups_that_hold_the_wanted_share_of_tokens_are_flat_and_come_last() -> None:
    made = with_flat_share([group(1, 10), group(2, 30), group(3, 15), group(4, 45)], share=0.4)
    flat = {samples[0].token_ids[0] for samples in made if all(sample.advantage == 0.0 for sample in samples)}
    assert flat == {1, 2}  # 40 of 100 tokens
    assert [samples[0].token_ids[0] for samples in made] == [3, 4, 1, 2]
    assert [sample.advantage for sample in made[0]] == pytest.approx([-(0.5**0.5), 0.5**0.5], rel=1e-5)


def test_a_rollout_has_the_main_jobs_shape_and_the_policys_logprobs(config: Config, groups: list) -> None:
    assert [len(samples) for samples in groups] == [2] * 4
    for samples in groups:
        assert len({sample.token_ids[: sample.prompt_len] for sample in samples}) == 1
        for sample in samples:
            assert 1 <= len(sample.rollout_logprobs) == len(sample.token_ids) - sample.prompt_len <= 6
            assert all(logprob < 0.0 for logprob in sample.rollout_logprobs)


def test_each_side_is_trained_on_what_it_says(config: Config, groups: list) -> None:
    times = step_times(config, groups, shares=(0.5,), num_rounds=1)
    num_tokens = sum(len(sample.rollout_logprobs) for samples in groups for sample in samples)
    (whole,), ((left,),), (asked,), (nothing,) = times.whole, times.left_out, times.asked, times.nothing
    assert [each.result.num_tokens for each in (whole, left, asked, nothing)] == [num_tokens] * 4
    assert whole.result.num_trained_tokens == num_tokens
    assert 0 < left.result.num_trained_tokens == asked.result.num_trained_tokens < num_tokens
    assert nothing.result.num_trained_tokens == 0
    assert left.result.entropy != asked.result.entropy
    assert nothing.result.entropy is None
    assert min(each.cpu_s for each in (whole, left, asked, nothing)) > 0.0


def report(num_trained: int) -> TrainReport:
    return TrainReport(0.0, 0.0, 1.0, None, 0.0, 0.0, None, 100, num_trained, 1, 1)


def steps(*cpu_s: float, num_trained: int) -> list[Timed[TrainReport]]:
    return [Timed(0.0, report(num_trained), cpu) for cpu in cpu_s]


@pytest.mark.parametrize(("left_s", "holds"), [(5.2, True), (5.3, False)])
def test_a_saving_is_a_ratio_of_cpu_times_and_that_of_passes_leaves_the_fixed_part_out(
    left_s: float, holds: bool
) -> None:
    times = StepTimes(
        whole=steps(10.0, 10.0, 40.0, num_trained=100),
        left_out=(steps(left_s, left_s, left_s, num_trained=50),),
        asked=steps(8.0, 8.0, 8.0, num_trained=50),
        nothing=steps(0.5, 0.5, 0.5, num_trained=0),
    )
    rows = {row.id: row for row in saving_rows(times)}
    assert rows["flat_groups.all.cpu"].value == 10.0
    assert rows["flat_groups.nothing.cpu"].value == 0.5
    assert rows["flat_groups.flat50.cpu"].value == left_s
    saving = rows["flat_groups.flat50.saving"]
    assert (saving.value, saving.reach, saving.holds) == (10.0 / left_s, ">= 1.9", holds)
    assert rows["flat_groups.flat50.passes.saving"].value == pytest.approx(9.5 / (left_s - 0.5))
    assert rows["flat_groups.asked.saving"].value == 1.25


def test_weights_are_the_same_to_a_millionth_and_a_difference_is_found(config: Config, groups: list) -> None:
    compared = compared_weights(config, groups)
    assert compared.num_steps == 3
    assert compared.largest_move > 1e-5
    assert [row.holds for row in weight_rows(compared)] == [None, True]
    assert [row.holds for row in weight_rows(Compared(3, 2e-6, 1e-2))] == [None, False]
