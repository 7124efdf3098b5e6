"""Samples whose advantage is zero take no pass, and nothing else changes: weights, means, splits, ranks."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slime_spec.bench.reference_trainer import hf_logprobs, near_policy, reference_steps, tiny_samples
from slime_spec.config.tree import Config
from slime_spec.types import TrainReport, TrainSample
from tests.support.tiny_models import load_reference
from tests.trainer.trainer_support import make_policy, run_ranks, tiny_config
from trainer_bridge.flat_samples import is_flat, split_batch
from trainer_bridge.packing import plan_microbatches

GROUP = 4
# The flat samples of each step of three groups of four: a whole group, nearly all, all (a step of no gradient at all),
# single samples of a mixed group, none.
FLAT = ((4, 5, 6, 7), tuple(range(11)), tuple(range(12)), (1, 2, 9), ())
DECAYING = {"weight_decay": 0.5, "lr_warmup_steps": 4}
# Gradients far below epsilon hardly move a weight, so that the order of a sum's terms, which differs, cannot either:
# with an epsilon of 1e-4 it moved one weight in 5,120 by 1.4e-6 where two threads computed products.
CALM = {**DECAYING, "adam_eps": 1e-3}
CASES = {
    "1x1": CALM,
    "1x1, optimizer steps across groups": {**CALM, "global_batch_size": 5},
    "DP2, an optimizer step per group": {**CALM, "world_size": 2, "global_batch_size": 4},
    "DP2 with the distributed optimizer": {**CALM, "world_size": 2, "use_distributed_optimizer": True},
    "PP2": {**CALM, "world_size": 2, "pipeline_model_parallel_size": 2},
}
Batches = Sequence[Sequence[TrainSample]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy"), "Qwen2ForCausalLM", tied=True)


@pytest.fixture(scope="module")
def batches(folder: Path) -> Batches:
    made = [near_policy(folder, tiny_samples(seed)) for seed in range(len(FLAT))]
    return [flattened(samples, flat) for samples, flat in zip(made, FLAT, strict=True)]


def flattened(samples: Sequence[TrainSample], flat: Sequence[int]) -> list[TrainSample]:
    return [replace(sample, advantage=0.0) if i in flat else sample for i, sample in enumerate(samples)]


def trained(
    config: Config, batches: Batches, leaves_out_flat: bool = True
) -> tuple[list[TrainReport], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The reports, the same on all ranks, and the weights before and after."""
    answers = run_ranks(config.trainer.world_size, "train", config, batches, leaves_out_flat)
    before = {name: tensor for part, _, _ in answers for name, tensor in part.items()}
    after = {name: tensor for _, _, part in answers for name, tensor in part.items()}
    assert all(reports == answers[0][1] for _, reports, _ in answers)
    return answers[0][1], before, after


def num_tokens(samples: Sequence[TrainSample]) -> int:
    return sum(len(sample.rollout_logprobs) for sample in samples)


@pytest.mark.parametrize("trainer", CASES.values(), ids=CASES)
def test_steps_leave_the_weights_that_passes_over_all_samples_leave(
    trainer: dict[str, Any], folder: Path, batches: Batches
) -> None:
    config = tiny_config(folder, trainer)
    got, before, after = trained(config, batches)
    expected, _, slow = trained(config, batches, leaves_out_flat=False)
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, slow[name], atol=1e-6, rtol=0.0)
        assert (tensor - before[name]).abs().max() > 1e-3, f"{name} hardly moved, so its agreement would mean little"
    for ours, theirs, batch in zip(got, expected, batches, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-6)
        assert ours.pg_loss == pytest.approx(theirs.pg_loss, abs=1e-6)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
        assert (ours.clip_fraction, ours.kl) == (theirs.clip_fraction, theirs.kl)
        assert (ours.num_tokens, ours.num_optimizer_steps) == (theirs.num_tokens, theirs.num_optimizer_steps)
        assert ours.num_trained_tokens == num_tokens([sample for sample in batch if sample.advantage])
        assert theirs.num_trained_tokens == theirs.num_tokens == num_tokens(batch)


def test_where_a_group_is_a_microbatch_the_weights_are_the_same_bit_for_bit(folder: Path, batches: Batches) -> None:
    whole_groups = [flattened(batch, range(4 * (i % 3), 12)) for i, batch in enumerate(batches)]
    config = tiny_config(folder, {**DECAYING, "max_tokens_per_microbatch": 1})
    _, _, after = trained(config, whole_groups)
    _, _, slow = trained(config, whole_groups, leaves_out_flat=False)
    assert all(torch.equal(tensor, slow[name]) for name, tensor in after.items())


def test_a_step_of_flat_samples_alone_decays_weights_and_moments_and_counts(folder: Path, batches: Batches) -> None:
    """By hand: after a step on a gradient g, a step on none moves by the decayed moments, and weights decay."""
    config = tiny_config(folder, CALM)
    trainer = config.trainer
    flat = flattened(batches[0], range(12))
    (_, report), _, after = trained(config, [batches[0], flat])
    _, before, once = trained(config, [batches[0]])
    assert (report.grad_norm, report.loss, report.num_trained_tokens) == (0.0, 0.0, 0)
    for name, weight in once.items():
        first_lr, lr = trainer.lr * 1 / 4, trainer.lr * 2 / 4
        decay = trainer.weight_decay if weight.dim() > 1 else 0.0
        # Both of Adam's moments were g and g^2 once corrected: the first update tells u = g / (|g| + eps), and so g.
        u = ((before[name] * (1 - first_lr * decay) - weight) / first_lr).double()
        g = u * trainer.adam_eps / (1 - u.abs()).clamp(min=1e-12)
        (b1, b2) = trainer.adam_beta1, trainer.adam_beta2
        moment = b1 * (1 - b1) * g / (1 - b1**2)
        scale = (b2 * (1 - b2) * g**2 / (1 - b2**2)).sqrt()
        expected = weight.double() * (1 - lr * decay) - lr * moment / (scale + trainer.adam_eps)
        torch.testing.assert_close(after[name].double(), expected, atol=2e-5, rtol=0.0)
        assert (after[name] - weight).abs().max() > 1e-4, name


def test_the_loss_is_a_mean_over_all_tokens_and_its_gradient_too(folder: Path, batches: Batches) -> None:
    """By hand, with Hugging Face: the sum over the samples that have an advantage, over the tokens of all."""
    ((report,), _, _) = trained(tiny_config(folder), batches[:1])
    model = load_reference(folder)
    model.requires_grad_()
    total = torch.zeros(())
    clipped = 0
    for sample in batches[0]:
        if sample.advantage:
            logprobs, _ = hf_logprobs(model, sample)
            ratio = (logprobs - torch.tensor(sample.rollout_logprobs)).exp()
            free, held = ratio * sample.advantage, ratio.clamp(0.8, 1.2) * sample.advantage
            total = total - torch.minimum(free, held).sum()
            clipped += int((held < free).sum())
    n = num_tokens(batches[0])
    (total / n).backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    assert report.loss == pytest.approx(total.item() / n, abs=1e-6)
    assert report.grad_norm == pytest.approx(norm, rel=1e-4)
    assert report.clip_fraction == clipped / n
    assert 0 < report.num_trained_tokens < report.num_tokens == n


@pytest.mark.parametrize("layout", ["1x1", "DP2, an optimizer step per group", "PP2"])
def test_metrics_of_all_samples_are_those_of_a_trainer_that_passes_over_all(
    layout: str, folder: Path, batches: Batches
) -> None:
    as_the_reference = {"lr_warmup_steps": 0, "adam_eps": 1e-8, "lr": 1e-4}
    config = tiny_config(folder, {**CASES[layout], **as_the_reference, "metrics_of_all_samples": True})
    got, _, after = trained(config, batches[:3])
    expected, _ = reference_steps(config, batches[:3])
    for report, theirs in zip(got, expected, strict=True):
        assert report.entropy == pytest.approx(theirs.entropy, abs=1e-4)
        diff = report.train_rollout_logprob_abs_diff
        assert diff == pytest.approx(theirs.train_rollout_logprob_abs_diff, abs=1e-4)
    _, _, unasked = trained(replace(config, trainer=replace(config.trainer, metrics_of_all_samples=False)), batches[:3])
    assert all(torch.equal(tensor, unasked[name]) for name, tensor in after.items()), "metrics must not move weights"


def test_unasked_metrics_are_of_the_trained_tokens_and_none_where_there_are_none(
    folder: Path, batches: Batches
) -> None:
    reports, _, _ = trained(tiny_config(folder, {"lr": 0.0}), batches[:3])
    model = load_reference(folder)
    for report, batch in zip(reports[:2], batches[:2], strict=True):
        with torch.no_grad():
            of_trained = [(hf_logprobs(model, sample), sample) for sample in batch if sample.advantage]
        entropy = torch.cat([entropy for (_, entropy), _ in of_trained])
        diff = torch.cat([(logprobs - torch.tensor(s.rollout_logprobs)).abs() for (logprobs, _), s in of_trained])
        assert report.entropy == pytest.approx(float(entropy.mean()), abs=1e-5)
        assert report.train_rollout_logprob_abs_diff == pytest.approx(float(diff.mean()), abs=1e-5)
    assert (reports[2].entropy, reports[2].train_rollout_logprob_abs_diff) == (None, None)
    assert (reports[2].loss, reports[2].clip_fraction) == (0.0, 0.0)


def test_with_a_kl_to_the_reference_every_sample_is_trained(folder: Path, batches: Batches) -> None:
    config = tiny_config(folder, CALM, {"kl_loss_coef": 0.1})
    reports, _, _ = trained(config, batches[:3])
    assert all(report.num_trained_tokens == report.num_tokens for report in reports)
    assert reports[1].kl > 0.0
    expected, _ = reference_steps(config, [batches[0]])
    assert reports[0].loss == pytest.approx(expected[0].loss, abs=1e-4)


def test_a_flat_sample_with_a_logprob_that_is_not_finite_still_stops_the_step(folder: Path) -> None:
    good = tiny_samples(seed=1)
    poison = replace(good[0], advantage=0.0, rollout_logprobs=(math.nan, *good[0].rollout_logprobs[1:]))
    ((problem, unchanged, _),) = run_ranks(1, "poisoned_step", tiny_config(folder), [poison, *good[1:]])
    assert "has loss nan" in problem
    assert unchanged


def test_a_batch_is_split_in_order_and_by_exact_zeros() -> None:
    zero, tiny, minus = (TrainSample((1, 2, 3), 1, (-1.0, -1.0), a) for a in (0.0, 1e-30, -0.0))
    assert [is_flat(sample) for sample in (zero, tiny, minus)] == [True, False, True]
    batch = split_batch([zero, tiny, minus, tiny], leave_out_flat=True)
    assert (batch.trained, batch.flat) == ((tiny, tiny), (zero, minus))
    assert (batch.num_trained_tokens, batch.num_flat_tokens, batch.num_tokens) == (4, 4, 8)
    assert split_batch([zero, tiny], leave_out_flat=False).trained == (zero, tiny)
    assert is_flat(replace(zero, rollout_logprobs=(-1.0, -math.inf))) is False


def test_ranks_share_the_work_that_is_left_and_each_has_some_microbatch() -> None:
    prompts = [TrainSample((i, *range(20)), 1, (0.0,) * 20, float(i % 2)) for i in range(16)]
    left = split_batch(prompts, leave_out_flat=True).trained
    load = [sum(segment.num_tokens for plan in rank for segment in plan) for rank in plan_microbatches(left, 1000, 2)]
    assert load == [4 * 20, 4 * 20]
    assert plan_microbatches([], 1000, 2) == [[()], [()]]
