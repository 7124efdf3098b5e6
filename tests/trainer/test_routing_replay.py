"""The trainer computes with the experts that the engine chose, in every layout as transformers with them forced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
import torch

from rollout.embedded.assemble import Assembly
from slime_spec.bench.reference_trainer import hf_logprobs, near_policy, tiny_samples
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.preflight.routing import check_routed
from slime_spec.routed_experts import Ids, RoutedExperts, id_dtype
from slime_spec.types import GroupRequest, TrainReport, TrainSample
from tests.support.embedded_harness import greedy, run
from tests.support.forced_experts import Routing, same_sets
from tests.support.tiny_models import MIXED, load_reference
from tests.trainer.mixed_policies import (
    LAYOUTS,
    Reference,
    assert_is_transformers,
    mixed_policy,
    passed,
    reference_pass,
)
from tests.trainer.trainer_support import run_ranks, tiny_config
from trainer_bridge.packing import form_segments

OF_FOUR_RANKS = pytest.param("TP2 PP2 EP2", marks=pytest.mark.long)
LAYOUTS_OF_PASSES = [
    *("one rank", "TP2 EP2", "TP2 EP2 with recomputed activations", "TP2 ETP2", "PP2", "DP2 EP2"),
    OF_FOUR_RANKS,
]


@pytest.fixture(params=MIXED)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(request.param, tmp_path_factory.getbasetemp())


@cache
def folder_of(architecture: str, root: Path) -> Path:
    return mixed_policy(root / f"replayed-{architecture}", architecture)


def random_choices(spec: ModelSpec, num_tokens: int, seed: int) -> Ids:
    """Some experts of every layer for every token, the same ones for a seed."""
    assert spec.experts is not None
    shape = (num_tokens, len(spec.experts.layers(spec.num_layers)), spec.experts.num_experts)
    drawn = np.random.default_rng(seed).random(shape).argsort(axis=-1)[..., : spec.experts.num_per_token]
    return drawn.astype(id_dtype(spec.experts.num_experts))


@cache
def forced_reference(folder: Path) -> Reference:
    """Samples with choices that no router makes; siblings agree on their prompt, but for one of the first group.

    A sample of the second group has choices for its first tokens only: the router chooses for the others.
    """
    spec = ModelSpec.from_folder(folder)
    samples = []
    for index, sample in enumerate(tiny_samples(seed=3)):
        prompt_seed = 1000 + (99 if index == 1 else sum(sample.token_ids[: sample.prompt_len]))
        num_response = len(sample.token_ids) - sample.prompt_len - 1
        ids = [random_choices(spec, sample.prompt_len, prompt_seed), random_choices(spec, num_response, index)]
        routed = RoutedExperts.of(np.concatenate(ids))
        samples.append(replace(sample, routed_experts=routed.first(sample.prompt_len - 1) if index == 6 else routed))
    model = load_reference(folder)
    noise = torch.Generator().manual_seed(5)
    with Routing(model, spec).watched() as routing, torch.no_grad():
        for index, sample in enumerate(samples):
            assert sample.routed_experts is not None
            routing.forced = sample.routed_experts.ids
            logprobs, _ = hf_logprobs(model, sample)
            near = logprobs + 0.3 * torch.randn(logprobs.shape, generator=noise)
            samples[index] = replace(sample, rollout_logprobs=tuple(near.tolist()))
    return reference_pass(folder, samples)


@pytest.mark.parametrize("layout", LAYOUTS_OF_PASSES)
def test_a_pass_with_other_choices_is_transformers_with_them_forced(layout: str, folder: Path) -> None:
    reference = forced_reference(folder)
    assert_is_transformers(passed(reference, dict(LAYOUTS[layout])), reference)


def test_the_forced_choices_are_others_and_change_every_response(folder: Path) -> None:
    """Otherwise the test above would say nothing."""
    reference = forced_reference(folder)
    model = load_reference(folder)
    for sample, logits in zip(reference.samples, reference.logits, strict=True):
        with torch.no_grad():
            own = model(torch.tensor([sample.token_ids])).logits[0, sample.prompt_len - 1 : -1]
        assert (own - logits).abs().max() > 0.05


def engine_choices(folder: Path, samples: Sequence[TrainSample]) -> list[TrainSample]:
    """The samples with what the embedded engine's routers choose for their tokens."""
    config = replaying(tiny_config(folder))
    core = Assembly(config).core(0, perf_counter)
    requests = [GroupRequest(str(index), sample.token_ids, (1,), greedy(1)) for index, sample in enumerate(samples)]
    generated = run(core, requests)
    routed = [generated[str(index), 0].routed_experts for index in range(len(samples))]
    assert all(each is not None for each in routed)
    return [
        replace(sample, routed_experts=each.first(len(sample.token_ids) - 1))
        for sample, each in zip(samples, routed, strict=True)
        if each is not None
    ]


def replaying(config: Config) -> Config:
    return replace(config, rollout=replace(config.rollout, routing_replay=True))


@pytest.mark.parametrize("layout", ["one rank", "TP2 EP2", "PP2"])
def test_the_engine_chooses_as_the_trainer_does_and_then_replay_changes_no_bit(layout: str, folder: Path) -> None:
    samples = near_policy(folder, tiny_samples(seed=3))
    config = tiny_config(folder, dict(LAYOUTS[layout]))
    without = run_ranks(config.trainer.world_size, "mixed_pass", config, samples)
    replayed = run_ranks(config.trainer.world_size, "mixed_pass", replaying(config), engine_choices(folder, samples))
    for (_, logits, gradients, _), (_, same_logits, same_gradients, _) in zip(without, replayed, strict=True):
        assert logits.keys() == same_logits.keys()
        assert all(torch.equal(logits[index], same_logits[index]) for index in logits)
        assert not [name for name in gradients if not torch.equal(gradients[name], same_gradients[name])]


def reports_of(config: Config, batch: Sequence[TrainSample]) -> list[TrainReport]:
    return [reports[0] for _, reports, _ in run_ranks(config.trainer.world_size, "train", config, [batch])]


@pytest.mark.parametrize("layout", ["one rank", "TP2 EP2 with recomputed activations", "PP2", "DP2 EP2"])
def test_a_step_reports_how_often_its_routers_would_have_chosen_otherwise(layout: str, folder: Path) -> None:
    reference = forced_reference(folder)
    config = replaying(tiny_config(folder, dict(LAYOUTS[layout])))
    for report in reports_of(config, reference.samples):
        assert report.routing_disagreement == pytest.approx(disagreement(reference, config), abs=2e-3)
    agreeing = engine_choices(folder, near_policy(folder, tiny_samples(seed=3)))
    assert {report.routing_disagreement for report in reports_of(config, agreeing)} == {0.0}


def disagreement(reference: Reference, config: Config) -> float:
    """What transformers' routers say, a segment's prompt counted once, as it is computed once."""
    model = load_reference(reference.folder)
    differs: list[bool] = []
    with Routing(model, ModelSpec.from_folder(reference.folder)).watched() as routing, torch.no_grad():
        for segment in form_segments(reference.samples, config.trainer.max_tokens_per_microbatch):
            for place, index in enumerate(segment.sample_indices):
                sample = reference.samples[index]
                assert sample.routed_experts is not None
                routing.forced = sample.routed_experts.ids
                model(torch.tensor([sample.token_ids]))
                others = ~same_sets(routing.choices[: len(routing.forced)], routing.forced)
                differs += others[segment.prompt_len if place else 0 :].flatten().tolist()
    return float(np.mean(differs))


def test_the_reference_model_routes_by_itself(folder: Path) -> None:
    reference = forced_reference(folder)
    config = replaying(tiny_config(folder, algorithm={"kl_loss_coef": 0.1}))
    (report,) = reports_of(config, reference.samples)
    model = load_reference(folder)
    kl = []
    with torch.no_grad():
        for sample, logits in zip(reference.samples, reference.logits, strict=True):
            by_itself, _ = hf_logprobs(model, sample)
            targets = torch.tensor(sample.token_ids[sample.prompt_len :])
            forced = logits.log_softmax(dim=-1).gather(-1, targets[:, None])[:, 0]
            log_ratio = by_itself - forced
            kl.append(log_ratio.exp() - log_ratio - 1)
    assert report.kl == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4)
    assert report.kl > 0.01


def test_siblings_share_their_prompt_where_its_experts_agree(folder: Path) -> None:
    samples = forced_reference(folder).samples
    segments = form_segments(samples, max_tokens=10_000)
    assert [segment.sample_indices for segment in segments] == [(0, 2, 3), (1,), (4, 5, 7), (6,), (8, 9, 10, 11)]


def test_samples_without_experts_or_with_those_of_another_model_are_refused(folder: Path) -> None:
    spec, (sample, *_) = ModelSpec.from_folder(folder), forced_reference(folder).samples
    assert sample.routed_experts is not None
    assert spec.experts is not None
    ids = sample.routed_experts.ids
    for wrong in (
        None,
        RoutedExperts.of(ids[:, :-1]),
        RoutedExperts.of(ids[..., 1:]),
        RoutedExperts.of(ids + np.uint8(8)),
    ):
        with pytest.raises(ConfigError, match="train sample: must have the experts that its engine chose"):
            check_routed([replace(sample, routed_experts=wrong)], spec.experts, spec.num_layers)
    check_routed([sample], spec.experts, spec.num_layers)
