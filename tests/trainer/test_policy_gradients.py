"""Gradients of every loss and mean, packed and in parallel layouts, against one plain autograd computation.

That is a forward pass of each sample alone in Hugging Face's model, and the papers' formulas token by token.
"""

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slime_spec.bench.reference_trainer import hf_logprobs, near_policy, tiny_samples
from slime_spec.config.algorithm import AlgorithmConfig
from slime_spec.config.tree import Config, RolloutConfig
from slime_spec.rl.advantages import with_advantages
from slime_spec.types import TrainReport, TrainSample
from tests.support.tiny_models import load_reference
from tests.trainer.trainer_support import make_policy, run_ranks, tiny_config

REFERENCE_SCALE = 1.05
MAX_RESPONSE_LEN = 16
DP2: dict[str, Any] = {"world_size": 2}
PP2: dict[str, Any] = {"world_size": 2, "pipeline_model_parallel_size": 2}
TP2: dict[str, Any] = {"world_size": 2, "tensor_model_parallel_size": 2}
TWO_STEPS = {"num_steps_per_rollout": 2, "lr": 1e-3, "adam_eps": 1e-3}  # far from Adam's sign of a gradient of noise
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "GSPO, DP2": (DP2, {"advantage_estimator": "gspo", "eps_clip": 0.02}),
    "GSPO by tokens, PP2, two steps": (PP2 | TWO_STEPS, {"advantage_estimator": "gspo", "loss_mean": "token"}),
    "CISPO with masked importance sampling, PP2": (
        PP2,
        {"advantage_estimator": "cispo", "use_tis": True, "tis_mode": "mask", "tis_clip": 1.3, "tis_clip_low": 0.8},
    ),
    "Dr. GRPO with dual clip, DP2": (DP2, {"advantage_estimator": "dr_grpo", "eps_clip_c": 1.25}),
    "Dr. GRPO, PP2": (PP2, {"advantage_estimator": "dr_grpo"}),
    "sample mean and entropy, TP2": (TP2, {"loss_mean": "sample", "entropy_coef": 0.5}),
    "k2 and entropy, PP2": (PP2, {"kl_loss_coef": 0.5, "kl_loss_type": "k2", "entropy_coef": 0.1}),
    "low_var_kl, DP2": (DP2, {"kl_loss_coef": 0.5, "kl_loss_type": "low_var_kl"}),
    "k1": ({}, {"kl_loss_coef": 0.5, "kl_loss_type": "k1"}),
    "REINFORCE++ with KL in rewards, PP2": (
        PP2,
        {"advantage_estimator": "reinforce_plus_plus", "kl_coef": 0.5, "gamma": 0.9},
    ),
    "RLOO with KL in rewards, truncated importance sampling, DP2, two steps": (
        DP2 | TWO_STEPS,
        {"advantage_estimator": "rloo", "kl_coef": 0.1, "use_tis": True, "tis_clip": 1.2},
    ),
    "truncated importance sampling, PP2, two steps": (PP2 | TWO_STEPS, {"use_tis": True, "tis_clip": 1.2}),
}


@dataclass(frozen=True)
class Computed:
    """A case's reports and gradients by optimizer step: ours, of every rank, and plain autograd's."""

    reports: list[TrainReport]
    gradients: list[dict[str, torch.Tensor]]
    losses: list[float]
    expected: list[dict[str, torch.Tensor]]
    reward_kl: float | None
    tis: tuple[float, float, float] | None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy"), "Qwen2ForCausalLM", tied=True)


@pytest.fixture(scope="module")
def samples(folder: Path) -> list[TrainSample]:
    """Three prompts, of which the second is flat, with rewards for estimators that run in the trainer."""
    rng = random.Random(3)
    made = near_policy(folder, tiny_samples(seed=2))
    return [
        replace(sample, group=i // 4, reward=rng.random(), advantage=0.0 if 4 <= i < 8 else sample.advantage)
        for i, sample in enumerate(made)
    ]


@pytest.fixture(scope="module", params=CASES)
def computed(request: pytest.FixtureRequest, folder: Path, samples: list[TrainSample]) -> Computed:
    trainer, algorithm = CASES[request.param]
    config = replace(
        tiny_config(folder, trainer, algorithm),
        rollout=RolloutConfig(batch_size=3, n_samples_per_prompt=4, max_response_len=MAX_RESPONSE_LEN),
    )
    answers = run_ranks(config.trainer.world_size, "gradients_of_steps", config, samples, REFERENCE_SCALE)
    of_steps = zip(*(steps for _, steps in answers), strict=True)
    merged = [{name: tensor for part in parts for name, tensor in part.items()} for parts in of_steps]
    return Computed([report for report, _ in answers], merged, *plain(config, folder, samples))


def test_gradients_are_those_of_plain_autograd(computed: Computed) -> None:
    for step, (got, expected) in enumerate(zip(computed.gradients, computed.expected, strict=True)):
        for name, gradient in expected.items():
            scale = gradient.abs().max().item()
            assert scale > 1e-6, f"{name} has no gradient, so its agreement would mean nothing"
            torch.testing.assert_close(got[name], gradient, atol=2e-4 * scale, rtol=1e-3, msg=f"{name} of step {step}")


def test_every_rank_reports_the_loss_that_was_minimised(computed: Computed) -> None:
    assert len(computed.losses) == computed.reports[0].num_optimizer_steps
    for report in computed.reports:
        assert report == computed.reports[0]
        if len(computed.losses) == 1:
            assert report.loss == pytest.approx(computed.losses[0], rel=1e-4, abs=1e-5)


def test_the_report_has_the_kl_of_rewards_and_the_importance_weights(computed: Computed) -> None:
    (report, *_) = computed.reports
    got = [] if report.tis is None else [report.tis.ratio, report.tis.clip_fraction, report.tis.abs_distance]
    assert got == pytest.approx(list(computed.tis or ()), rel=1e-4)
    kl = [] if report.reward_kl is None else [report.reward_kl]
    assert kl == pytest.approx([] if computed.reward_kl is None else [computed.reward_kl], rel=1e-4)


def plain(
    config: Config, folder: Path, samples: Sequence[TrainSample]
) -> tuple[list[float], list[dict[str, torch.Tensor]], float | None, tuple[float, float, float] | None]:
    """What Computed has of it: loss and gradients of each optimizer step, with AdamW between them."""
    model, algorithm, trainer = load_reference(folder), config.algorithm, config.trainer
    model.requires_grad_()
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(REFERENCE_SCALE)
        ref = [hf_logprobs(reference, sample)[0] for sample in samples]
        old = [hf_logprobs(model, sample)[0] for sample in samples]
    reward_kl = None
    if algorithm.kl_coef:
        kl = [torch.tensor(s.rollout_logprobs) - each for s, each in zip(samples, ref, strict=True)]
        samples = with_advantages(samples, algorithm, [tuple(each.tolist()) for each in kl])
        reward_kl = torch.cat(kl).mean().item()
    optimizer = torch.optim.AdamW(
        model.parameters(), trainer.lr, (trainer.adam_beta1, trainer.adam_beta2), trainer.adam_eps, 0.0
    )
    size = len(samples) // (trainer.num_steps_per_rollout or 1)
    losses, gradients = [], []
    for start in range(0, len(samples), size):
        optimizer.zero_grad()
        of_samples = [sample_losses(model, samples[i], ref[i], old[i], algorithm) for i in range(start, start + size)]
        loss = mean(of_samples, algorithm)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.clip_grad)
        optimizer.step()
    return losses, gradients, reward_kl, importance(samples, old, algorithm) if algorithm.use_tis else None


def importance(
    samples: Sequence[TrainSample], trainer: Sequence[torch.Tensor], algorithm: AlgorithmConfig
) -> tuple[float, float, float]:
    """Means over the tokens that have an advantage: the ratio, whether it is bounded, its distance from 1."""
    ratios = [
        math.exp(own - theirs)
        for sample, logprobs in zip(samples, trainer, strict=True)
        if any(sample.advantages)
        for own, theirs in zip(logprobs.tolist(), sample.rollout_logprobs, strict=True)
    ]
    bounded = [not algorithm.tis_clip_low <= ratio <= algorithm.tis_clip for ratio in ratios]
    assert 0 < sum(bounded) < len(ratios)
    return sum(ratios) / len(ratios), sum(bounded) / len(ratios), sum(abs(r - 1) for r in ratios) / len(ratios)


def mean(of_samples: Sequence[torch.Tensor], algorithm: AlgorithmConfig) -> torch.Tensor:
    kind = algorithm.loss_mean or {"gspo": "sample", "dr_grpo": "constant"}.get(algorithm.advantage_estimator, "token")
    if kind == "token":
        return torch.cat(list(of_samples)).mean()
    if kind == "sample":
        return torch.stack([each.mean() for each in of_samples]).mean()
    return torch.stack([each.sum() / MAX_RESPONSE_LEN for each in of_samples]).mean()


def sample_losses(
    model: torch.nn.Module, sample: TrainSample, ref: torch.Tensor, trainer: torch.Tensor, algorithm: AlgorithmConfig
) -> torch.Tensor:
    """The loss of each token of a sample."""
    logprobs, _ = hf_logprobs(model, sample)
    logits = model(torch.tensor([sample.token_ids])).logits[0, sample.prompt_len - 1 : -1]
    distribution = torch.distributions.Categorical(logits=logits.float())
    rollout = torch.tensor(sample.rollout_logprobs)
    old = trainer if algorithm.use_tis else rollout
    low, high = 1 - algorithm.eps_clip, 1 + algorithm.eps_clip
    losses = []
    for t, advantage in enumerate(sample.advantages):
        if algorithm.advantage_estimator == "gspo":
            ratio = ((logprobs - old).sum() / len(old)).exp()
        else:
            ratio = (logprobs[t] - old[t]).exp()
        if algorithm.advantage_estimator == "cispo":
            loss = -min(max(ratio.item(), low), high) * advantage * logprobs[t]
        else:
            objective = min(ratio * advantage, torch.clamp(ratio, low, high) * advantage)
            if algorithm.eps_clip_c and advantage < 0:
                objective = max(objective, torch.tensor(algorithm.eps_clip_c * advantage))
            loss = -objective
        if algorithm.use_tis:
            loss = loss * weight(math.exp(trainer[t] - rollout[t]), algorithm)
        loss = loss + algorithm.kl_loss_coef * kl_of(logprobs[t], ref[t], algorithm.kl_loss_type)
        losses.append(loss - algorithm.entropy_coef * distribution.entropy()[t])
    return torch.stack(losses)


def weight(ratio: float, algorithm: AlgorithmConfig) -> float:
    if algorithm.tis_mode == "mask":
        return ratio if algorithm.tis_clip_low <= ratio <= algorithm.tis_clip else 0.0
    return min(max(ratio, algorithm.tis_clip_low), algorithm.tis_clip)


def kl_of(logprob: torch.Tensor, ref: torch.Tensor, kind: str | None) -> torch.Tensor:
    difference = logprob - ref
    return {
        "k1": difference,
        "k2": difference**2 / 2,
        "low_var_kl": torch.clamp((-difference).exp() - 1 + difference, max=10.0),
    }.get(kind or "", torch.zeros(()))
