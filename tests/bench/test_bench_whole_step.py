"""The part on whole steps: what its sides run, and how it compares them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from slime_spec.bench.prompts import in_domain
from slime_spec.bench.whole_step import Compared, Job, Step, compared, frozen, jobs, rows_of
from slime_spec.config.tree import RolloutConfig
from slime_spec.launch.compose import compose
from slime_spec.types import TrainReport
from tests.support.tiny_policy import make_tiny_policy


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Job]]:
    folder = make_tiny_policy(tmp_path_factory.mktemp("policy"))
    shape = RolloutConfig(batch_size=4, n_samples_per_prompt=2, max_response_len=6)
    configs = [
        replace(compose(["--config", name, "--hf-checkpoint", str(folder), "speculative=none"]), rollout=shape)
        for name in ("smollm2-135m", "smollm2-135m-bf16")
    ]
    with jobs([frozen(each) for each in configs], in_domain(folder, 4, seed=0), seed=0) as made:
        yield made


def test_each_dtype_has_its_engine_and_trainer_and_a_step_leaves_the_policy_as_it_was(started: dict[str, Job]) -> None:
    assert {dtype: job.config.engine.dtype for dtype, job in started.items()} == {
        "float32": "float32",
        "bfloat16": "bfloat16",
    }
    for job in started.values():
        before = job.rollout()
        assert [len(group) for group in before] == [2] * 4
        samples = [replace(sample, advantage=1.0) for group in before for sample in group]
        report = job.step(samples).report
        assert report.num_trained_tokens == report.num_tokens > 0
        assert report.grad_norm > 0
        assert job.rollout() == before


def test_sides_are_trained_on_what_they_say_and_each_dtype_is_compared_with_its_own_engine(
    started: dict[str, Job],
) -> None:
    measured = compared(started, flat_share=0.5, num_rounds=1)
    (plain,), (job,), (bf16,) = (measured.steps[side] for side in ("plain", "job", "bf16"))
    assert plain.report.num_trained_tokens == plain.report.num_tokens
    assert 0 < job.report.num_trained_tokens == bf16.report.num_trained_tokens < plain.report.num_tokens
    assert job.report.num_tokens == bf16.report.num_tokens == plain.report.num_tokens
    assert all(seconds > 0 for step in (plain, job, bf16) for seconds in step.cpu_s.values())
    differences = {dtype: report.train_rollout_logprob_abs_diff for dtype, report in measured.own.items()}
    assert differences["float32"] < 1e-4 < differences["bfloat16"] < 0.1


def report(num_trained: int, difference: float = 0.0) -> TrainReport:
    return TrainReport(0.0, 0.0, 1.0, None, 0.0, 0.0, difference, 100, num_trained, 1, 1)


def steps(rollout: float, train: float, push: float, num_trained: int) -> list[Step]:
    """Two repetitions, the second on a machine half as fast."""
    made = [{"rollout": rollout * slow, "train": train * slow, "push": push * slow} for slow in (1.0, 2.0)]
    return [Step(cpu_s, report(num_trained)) for cpu_s in made]


@pytest.mark.parametrize(("train_s", "holds"), [(4.0, True), (4.5, False)])
def test_a_saving_is_a_ratio_of_whole_steps_pair_by_pair(train_s: float, holds: bool) -> None:
    measured = Compared(
        steps={
            "plain": steps(3.0, 8.0, 1.0, num_trained=100),
            "job": steps(3.0, 6.0, 1.0, num_trained=75),
            "bf16": steps(3.0, train_s, 1.0, num_trained=75),
        },
        own={"float32": report(100, 1e-5), "bfloat16": report(100, 2e-2)},
    )
    rows = {row.id: row for row in rows_of(measured)}
    assert (rows["step.job.cpu"].value, rows["step.job.train.cpu"].value) == (15.0, 9.0)
    assert "25.0% of the tokens in flat groups" in rows["step.job.cpu"].what
    assert rows["step.job.saving"].value == pytest.approx(12 / 10)
    assert rows["step.job.train.saving"].value == pytest.approx(8 / 6)
    assert rows["step.bf16_alone.train.saving"].value == pytest.approx(6 / train_s)
    whole = rows["step.bf16.saving"]
    assert (whole.value, whole.holds) == (pytest.approx(12 / (4 + train_s)), holds)
    assert rows["step.bfloat16.logprob_abs_diff"].value == 2e-2
