"""Drafts at a temperature of their own: what verification is told is what they were drawn from, and nothing bends."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rollout.embedded.core import GenerationCore
from rollout.embedded.draft import NO_DRAFT, Draft
from rollout.embedded.drafters.chain import grow_chains
from rollout.embedded.drafters.step import DraftVocab, Drawing
from rollout.embedded.drafting import DraftContext, KvRow
from rollout.embedded.plan import RowSpan
from rollout.embedded.tempering import Tempering, overlaps
from rollout.embedded.uniforms import Noise, Uniforms
from rollout.embedded.verification.verifier import VerifyRow
from slime_spec.config.tree import Config, SpeculativeConfig
from slime_spec.speculation.draft_temperature import MOST_ROUNDS, OWN, TEMPERATURES, DraftTemperature
from slime_spec.speculation.draft_temperature_reference import overlap_reference
from slime_spec.types import GroupRequest, SamplingParams
from tests.embedded.test_rejection_distribution import RULES
from tests.support.draft_formats import TinyDraft, make_format
from tests.support.embedded_harness import Samples, make_core, random_prompt, run
from tests.support.emission import (
    Distribution,
    Toy,
    chain_distribution,
    joint_distribution,
    largest_error,
    sampled_drafts,
)
from tests.support.markov_toy import TARGET_LOGITS, drawn_from, markov_step

PLAIN = SamplingParams()
FILTERED = SamplingParams(temperature=0.7, top_k=2, top_p=0.87, min_p=0.05)


def a_round(rule: str, toy: Toy, temperature: float, told: float | None = None) -> Callable[..., Distribution]:
    """A round's distribution after the tokens so far, over all drafts at ``temperature``, judged as if at ``told``."""

    def after(done: tuple[int, ...]) -> Distribution:
        distribution: Distribution = {}
        for draft, weight in sampled_drafts(lambda x: drawn_from(x, temperature), (*toy.prompt, *done)[-1], 2):
            judged = draft if told is None else at_temperature(draft, (*toy.prompt, *done)[-1], told)
            for emitted, probability in chain_distribution(RULES[rule], toy, done, judged).items():
                distribution[emitted] = distribution.get(emitted, 0.0) + weight * probability
        return distribution

    return after


def at_temperature(draft: Draft, root: int, temperature: float) -> Draft:
    before = (root, *draft.token_ids[:-1])
    return Draft.chain(draft.token_ids, torch.stack([drawn_from(token, temperature) for token in before]))


@pytest.mark.parametrize(("temperature", "params"), [(0.4, PLAIN), (1.7, PLAIN), (0.4, FILTERED)])
@pytest.mark.parametrize("rule", RULES)
def test_drafts_at_any_temperature_leave_the_joint_distribution_of_three_tokens_unchanged(
    rule: str, temperature: float, params: SamplingParams
) -> None:
    toy = Toy(TARGET_LOGITS, params, prompt=(1, 2))
    joint = joint_distribution(a_round(rule, toy, temperature * params.temperature), 3)
    assert largest_error(joint, toy.autoregressive(3)) < 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_a_temperature_that_depends_on_all_earlier_tokens_leaves_the_distribution_unchanged(rule: str) -> None:
    toy = Toy(TARGET_LOGITS, prompt=(1, 2))

    def after(done: tuple[int, ...]) -> Distribution:
        return a_round(rule, toy, TEMPERATURES[(sum(done) + 2 * len(done)) % 5])(done)

    assert largest_error(joint_distribution(after, 3), toy.autoregressive(3)) < 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_negative_control_verification_that_is_told_another_temperature_is_caught(rule: str) -> None:
    toy = Toy(TARGET_LOGITS, prompt=(1, 2))
    joint = joint_distribution(a_round(rule, toy, 0.4, told=1.0), 3)
    assert largest_error(joint, toy.autoregressive(3)) > 1e-2


@pytest.mark.parametrize("rule", RULES)
def test_negative_control_a_temperature_that_depends_on_the_drafted_token_is_caught(rule: str) -> None:
    """A draft is drawn at both temperatures, and the sharp one is taken where it begins with token 0."""
    toy = Toy(TARGET_LOGITS, prompt=(1, 2))

    def after(done: tuple[int, ...]) -> Distribution:
        root = (*toy.prompt, *done)[-1]
        sharp = sampled_drafts(lambda x: drawn_from(x, 0.2), root, 2)
        flat = sampled_drafts(lambda x: drawn_from(x, 1.0), root, 2)
        of_sharp = sum(weight for draft, weight in sharp if draft.token_ids[0] == 0)
        taken = [(draft, weight) for draft, weight in sharp if draft.token_ids[0] == 0]
        taken += [(draft, (1.0 - of_sharp) * weight) for draft, weight in flat]
        distribution: Distribution = {}
        for draft, weight in taken:
            for emitted, probability in chain_distribution(RULES[rule], toy, done, draft).items():
                distribution[emitted] = distribution.get(emitted, 0.0) + weight * probability
        return distribution

    assert largest_error(joint_distribution(after, 3), toy.autoregressive(3)) > 2e-3


def context(row: int, params: SamplingParams, uniform: float = 0.5, **settings: Any) -> DraftContext:
    uniforms = [uniform] * 8
    return DraftContext(row, 0, KvRow(row), [row % 3], 1, 3, 3, params, uniforms, noise=Noise(row), **settings)


def grown(contexts: list[DraftContext], drawing: Drawing) -> list[Draft]:
    first = markov_step(torch.tensor([each.token_ids[-1] for each in contexts]), torch.empty(0), [])
    slots = [RowSpan(row, 5, 1) for row in range(len(contexts))]
    return [each.read() for each in grow_chains(first, markov_step, slots, contexts, 3, DraftVocab(3), drawing)]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_a_sampled_chain_reports_the_very_distribution_that_its_tokens_are_drawn_from(temperature: float) -> None:
    params, steps = SamplingParams(temperature=0.8), 2_000
    contexts = [context(0, params, (index + 0.5) / steps, draft_temperature=temperature) for index in range(steps)]
    drafts = grown(contexts, Drawing.SAMPLED)
    expected = drawn_from(0, 0.8 * temperature)
    firsts = np.bincount([draft.token_ids[0] for draft in drafts], minlength=3) / steps
    assert np.abs(firsts - expected.numpy()).max() <= 1.5 / steps  # uniforms on a grid: off by a point at both ends
    for draft in drafts[::100]:
        before = (0, *draft.token_ids[:-1])
        told = torch.stack([drawn_from(token, 0.8 * temperature) for token in before])
        assert draft.q_draft is not None
        assert torch.allclose(draft.q_draft.double(), told, atol=1e-6)


@pytest.mark.parametrize("drawing", [Drawing.SAMPLED, Drawing.RACED])
def test_at_the_lowest_temperature_drafts_are_the_likeliest_tokens(drawing: Drawing) -> None:
    contexts = [context(row, PLAIN, (row + 0.5) / 40, draft_temperature=0.01) for row in range(40)]
    likeliest = grown(contexts, Drawing.LIKELIEST)
    assert [each.token_ids for each in grown(contexts, drawing)] == [each.token_ids for each in likeliest]
    own = [each._replace(draft_temperature=1.0) for each in contexts]
    assert [each.token_ids for each in grown(own, drawing)] != [each.token_ids for each in likeliest]


@pytest.mark.parametrize("drawing", [Drawing.SAMPLED, Drawing.RACED])
def test_a_context_that_asks_is_shown_what_its_first_token_was_drawn_from(drawing: Drawing) -> None:
    seen: list[torch.Tensor] = []
    asking = {"draft_temperature": 0.6, "on_first_distribution": seen.append}
    greedy = SamplingParams(temperature=0.0)
    grown([context(0, PLAIN), context(1, PLAIN, **asking), context(2, greedy, **asking)], drawing)
    (shown,) = seen
    assert torch.allclose(shown.double(), drawn_from(1, 0.6), atol=1e-6)


@pytest.mark.parametrize("drawn_at", [1.0, 0.6, 0.2])
def test_overlaps_are_the_references_whatever_the_draft_was_drawn_at(drawn_at: float) -> None:
    generator = torch.Generator().manual_seed(5)
    for spread in (0.5, 2.0, 4.0):
        p_logits = spread * torch.randn(300, generator=generator, dtype=torch.float64)
        q_logits = p_logits + torch.randn(300, generator=generator, dtype=torch.float64)
        p_target, own = p_logits.softmax(-1), q_logits.softmax(-1)
        q_draft = (q_logits / drawn_at).softmax(-1)
        found = overlaps(p_target.float(), q_draft.float(), drawn_at, TEMPERATURES)
        expected = [overlap_reference(p_target.tolist(), own.tolist(), 1.0 / each) for each in TEMPERATURES]
        # What is left out weighs 300 times 1e-4 of the likeliest token at most, in either distribution.
        left_out = 300e-4 * (float(p_target.max()) + float(own.max()))
        assert found == pytest.approx(expected, abs=left_out)
        assert found == pytest.approx(expected, abs=0.01)


def test_a_distribution_that_is_none_is_not_learned_from() -> None:
    policy = DraftTemperature()
    tempering = Tempering(policy)
    rows = [VerifyRow(NO_DRAFT, PLAIN, Uniforms(0, 8), [0], 1)]
    for bad in (torch.full((4,), torch.nan), torch.zeros(4)):
        for _ in range(MOST_ROUNDS):
            (asked,) = tempering.tempered([context(0, PLAIN)], [0])
            if asked.on_first_distribution is not None:
                asked.on_first_distribution(bad)
            tempering.weigh(torch.zeros(1, 4), rows)
    assert policy.num_observed == 0


PROMPTS = [random_prompt(3 + 5 * i, seed=i) for i in range(4)]
KINDS = [
    SamplingParams(max_new_tokens=24),
    SamplingParams(max_new_tokens=20, temperature=0.7, top_k=20, top_p=0.9),
    SamplingParams(max_new_tokens=20, frequency_penalty=0.8, min_p=0.02),
    SamplingParams(max_new_tokens=12, temperature=0.0),
]
REQUESTS = [GroupRequest(str(i), prompt, (2 * i, 2 * i + 1), KINDS[i]) for i, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyDraft:
    return make_format(tmp_path_factory.mktemp("eagle3"), "eagle3")


def tokens(samples: Samples) -> dict[tuple[str, int], tuple[int, ...]]:
    return {key: sample.token_ids for key, sample in samples.items()}


def without_speculation(config: Config) -> Config:
    return replace(config, speculative=SpeculativeConfig(algorithm="NONE", use_gumbel_coupling=True))


@pytest.mark.parametrize("temperature", [None, 0.05, 0.4, 3.0])
def test_under_coupling_no_draft_temperature_changes_a_token_of_a_seed(
    tiny: TinyDraft, temperature: float | None
) -> None:
    config = tiny.config(3, use_gumbel_coupling=True, draft_temperature=temperature)
    expected = tokens(run(make_core(without_speculation(config)), REQUESTS))
    samples = run(make_core(config), REQUESTS)
    assert tokens(samples) == expected
    assert sum(sample.spec.num_drafted for sample in samples.values()) > 60


@pytest.mark.parametrize("rule", ["use_rejection_sampling", "use_block_verification"])
def test_sampled_drafts_at_a_set_temperature_give_the_same_tokens_whatever_else_runs(
    tiny: TinyDraft, rule: str
) -> None:
    for temperature in (None, 0.5):
        config = tiny.config(3, draft_temperature=temperature, **{rule: True})
        alone = tokens(run(make_core(config), REQUESTS[:1]))
        crowded = tokens(run(make_core(config), REQUESTS))
        assert alone.items() <= crowded.items()


def steps(core: GenerationCore, seeds: range) -> None:
    run(core, [GroupRequest("g", PROMPTS[1], tuple(seeds), SamplingParams(max_new_tokens=60, ignore_eos=True))])


@pytest.mark.parametrize("rule", ["use_gumbel_coupling", "use_rejection_sampling"])
def test_the_engine_sharpens_its_drafts_where_the_policy_is_sharper_and_not_elsewhere(
    tiny: TinyDraft, rule: str
) -> None:
    """A draft of tiny random weights is nearly flat; the target's logits are stretched around its own choice."""
    config = tiny.config(2, **{rule: True})
    core = make_core(config)
    core.speculation.tempering = Tempering(DraftTemperature())
    assert core.speculation.draft_temperature == OWN
    logits_of, seen = core.target.logits, core.speculation.tempering

    def as_the_draft_but_sharp(hidden: torch.Tensor) -> torch.Tensor:
        logits = logits_of(hidden)
        if seen._kept is not None:
            logits = logits.clone()
            logits[:] = 6.0 * seen._kept[1].clamp(min=1e-9).log() * seen._kept[2]
        return logits

    core.target.logits = as_the_draft_but_sharp  # type: ignore[method-assign]
    steps(core, range(2))
    assert core.speculation.draft_temperature is not None
    assert core.speculation.draft_temperature < 0.5
    flat = make_core(config)
    flat.speculation.tempering = Tempering(DraftTemperature())
    steps(flat, range(2))
    assert flat.speculation.draft_temperature == OWN
