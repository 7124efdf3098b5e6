"""Exact proofs, without randomness: rejection sampling and block verification emit the target's distribution.

Every draft a drafter can sample is enumerated with its probability, and every uniform by the cells in which it decides
the same; what is checked is the batched code that the engine runs, in fp64.
"""

from collections.abc import Callable

import pytest
import torch

from rollout.embedded.draft import NO_DRAFT, Draft
from rollout.embedded.verification import make_device_verifier, make_verifier
from rollout.embedded.verification.reference import block_reference, rejection_reference
from rollout.embedded.verification.verifier import VerifyRow
from rollout.embedded.verification.verify_pass import RuleVerifier
from rollout.embedded.verification.walk import target_only
from slime_spec.config.tree import SpeculativeConfig
from slime_spec.types import SamplingParams
from tests.support.emission import (
    Distribution,
    FixedUniforms,
    Toy,
    chain_distribution,
    first_token,
    joint_distribution,
    largest_error,
    mean_accepted,
    sampled_drafts,
    total_variation,
    walk_distribution,
)

P_TARGET = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.25, 0.25], dtype=torch.float64) / 16
Q_DRAFT = torch.tensor([6.0, 4.0, 2.0, 1.0, 1.0, 0.5, 0.3, 0.2], dtype=torch.float64) / 15
FLAT = Toy(P_TARGET.log().expand(8, -1))
MARKOV = (torch.tensor([[5, 3, 1, 1], [1, 6, 2, 1], [2, 2, 4, 2], [1, 1, 1, 7]], dtype=torch.float64) / 10).log()
# What the drafter samples from after each token; the last two rows lack a token the target has, or are one-hot.
MARKOV_Q = torch.tensor([[3, 3, 2, 2], [2, 5, 1, 2], [5, 0, 3, 2], [0, 0, 0, 10]], dtype=torch.float64) / 10
CONFIGS = {
    "rejection": SpeculativeConfig(use_rejection_sampling=True),
    "block": SpeculativeConfig(use_block_verification=True),
}
RULES = {name: make_verifier(config, frozenset({3})) for name, config in CONFIGS.items()} | {
    f"{name} in batched operations": make_device_verifier(config, frozenset({3})) for name, config in CONFIGS.items()
}
SETTINGS = {
    "plain": SamplingParams(),
    "filters": SamplingParams(temperature=0.7, top_k=3, top_p=0.87, min_p=0.05),
    "all": SamplingParams(
        temperature=1.3,
        top_p=0.93,
        frequency_penalty=0.7,
        repetition_penalty=0.8,
        min_new_tokens=2,
        logit_bias=((0, 0.5),),
    ),
}


def sampled_round(
    rule: str, toy: Toy, q_of: Callable[[int], torch.Tensor], gamma: int, generated: tuple[int, ...]
) -> Distribution:
    """The distribution of a round, over the drafts sampled and the uniforms."""
    distribution: Distribution = {}
    for draft, weight in sampled_drafts(q_of, (*toy.prompt, *generated)[-1], gamma):
        for emitted, probability in chain_distribution(RULES[rule], toy, generated, draft).items():
            distribution[emitted] = distribution.get(emitted, 0.0) + weight * probability
    return distribution


@pytest.mark.parametrize("rule", RULES)
def test_a_sampled_draft_leaves_the_distribution_and_stands_as_often_as_the_distributions_overlap(rule: str) -> None:
    distribution = sampled_round(rule, FLAT, lambda _: Q_DRAFT, 1, ())
    assert largest_error(first_token(distribution), FLAT.autoregressive(1)) < 1e-12
    overlap = float(torch.minimum(P_TARGET, Q_DRAFT).sum())
    assert overlap == pytest.approx(0.8852, abs=1e-4)
    assert mean_accepted(distribution) == pytest.approx(overlap, abs=1e-12)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("rule", RULES)
def test_the_joint_distribution_of_three_tokens_is_the_autoregressive_one(rule: str, setting: str) -> None:
    toy = Toy(MARKOV, SETTINGS[setting], prompt=(1, 2), eos_token_ids=frozenset({3}))
    distribution = joint_distribution(lambda done: sampled_round(rule, toy, MARKOV_Q.__getitem__, 2, done), 3)
    assert largest_error(distribution, toy.autoregressive(3)) < 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_a_draft_from_a_reduced_vocabulary_leaves_the_distribution_unchanged(rule: str) -> None:
    reduced = torch.tensor([[0, 6, 0, 4], [0, 3, 0, 7], [0, 5, 0, 5], [0, 9, 0, 1]], dtype=torch.float64) / 10
    toy = Toy(MARKOV)
    distribution = joint_distribution(lambda done: sampled_round(rule, toy, reduced.__getitem__, 2, done), 3)
    assert largest_error(distribution, toy.autoregressive(3)) < 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_a_draft_without_q_is_a_point_mass_and_leaves_the_distribution_unchanged(rule: str) -> None:
    toy, drafts = Toy(MARKOV), {0: (1, 2), 1: (0, 3), 2: (2, 2), 3: (0, 0)}
    distribution = joint_distribution(
        lambda done: walk_distribution(RULES[rule], toy, done, Draft.chain(drafts[(0, *done)[-1]])), 3
    )
    assert largest_error(distribution, toy.autoregressive(3)) < 1e-12


@pytest.mark.parametrize("reference", [rejection_reference, block_reference])
def test_one_hot_q_and_the_walk_agree_on_the_distribution_of_what_a_point_mass_emits(reference: Callable) -> None:
    toy, draft = Toy(MARKOV), Draft.chain((1, 2))
    one_hot = torch.nn.functional.one_hot(torch.tensor(draft.token_ids), 4).double()
    distributions = toy.distributions((), draft)

    def by_reference(logits: torch.Tensor, rows: list[VerifyRow]) -> list:
        walked = RuleVerifier(target_only)(logits, rows)  # for the shape of the answer alone
        for row, verified in zip(rows, walked, strict=True):
            uniforms = row.uniforms.accept_of_round(0)
            verified.token_ids[:] = reference(row.draft.token_ids, one_hot, distributions, uniforms, row.uniforms.emit)
        return walked

    expected = chain_distribution(by_reference, toy, (), Draft.chain((1, 2), one_hot))
    assert largest_error(walk_distribution(RULES["rejection"], toy, (), draft), expected) < 1e-12


@pytest.mark.parametrize("drops", [False, True], ids=["cut where they are", "negative control: dropped whole"])
@pytest.mark.parametrize("rule", RULES)
def test_drafts_cut_where_their_logits_are_not_finite_leave_the_distribution_unchanged(rule: str, drops: bool) -> None:
    """Case audit/13: no token follows a drafted 2. A draft dropped for what it drew would bend the distribution."""
    toy = Toy(MARKOV, prompt=(1,))

    def kept(draft: Draft) -> Draft:
        if 2 not in draft.token_ids[:-1]:
            return draft
        length = 0 if drops else draft.token_ids.index(2) + 1
        assert draft.q_draft is not None
        return Draft.chain(draft.token_ids[:length], draft.q_draft[:length] if length else None, nonfinite=True)

    def a_round(done: tuple[int, ...]) -> Distribution:
        distribution: Distribution = {}
        for draft, weight in sampled_drafts(MARKOV_Q.__getitem__, (*toy.prompt, *done)[-1], 3):
            of_draft = chain_distribution if kept(draft).token_ids else walk_distribution
            for emitted, probability in of_draft(RULES[rule], toy, done, kept(draft)).items():
                distribution[emitted] = distribution.get(emitted, 0.0) + weight * probability
        return distribution

    error = largest_error(joint_distribution(a_round, 3), toy.autoregressive(3))
    assert error > 1e-3 if drops else error < 1e-12


def test_negative_control_softmax_q_with_an_argmax_draft_is_caught() -> None:
    drafted = int(Q_DRAFT.argmax())
    lie = chain_distribution(RULES["rejection"], FLAT, (), Draft.chain((drafted,), Q_DRAFT.unsqueeze(0)))
    assert total_variation(first_token(lie), FLAT.autoregressive(1)) == pytest.approx(0.46875, abs=1e-6)
    honest = walk_distribution(RULES["rejection"], FLAT, (), Draft.chain((drafted,)))
    assert largest_error(first_token(honest), FLAT.autoregressive(1)) < 1e-12


def test_block_verification_accepts_at_least_as_many_tokens_on_average() -> None:
    generator = torch.Generator().manual_seed(2)
    gains = []
    for _ in range(3):
        toy = Toy(1.5 * torch.randn(3, 3, generator=generator, dtype=torch.float64))
        q_draft = (1.5 * torch.randn(3, 3, generator=generator, dtype=torch.float64)).softmax(-1)
        block, token_wise = (
            mean_accepted(sampled_round(rule, toy, q_draft.__getitem__, 3, ())) for rule in ("block", "rejection")
        )
        gains.append(block - token_wise)
    assert min(gains) > -1e-12
    assert max(gains) > 0.02


@pytest.mark.parametrize("rule", RULES)
def test_the_target_as_its_own_drafter_has_every_draft_accepted(rule: str) -> None:
    distribution = sampled_round(rule, Toy(MARKOV), MARKOV.exp().__getitem__, 2, ())
    assert mean_accepted(distribution) == pytest.approx(2.0, abs=1e-12)


@pytest.mark.parametrize(("rule", "reference"), [("rejection", rejection_reference), ("block", block_reference)])
def test_the_batched_code_agrees_with_the_reference_uniform_for_uniform_in_mixed_batches(
    rule: str, reference: Callable
) -> None:
    generator = torch.Generator().manual_seed(4)
    params = [SamplingParams(), SamplingParams(temperature=0.8, top_k=6, top_p=0.9), SamplingParams(min_p=0.1)]
    accepted = 0
    for _ in range(100):
        toys, drafts, uniforms = [], [], []
        for each in params:
            toys.append(Toy(torch.randn(9, 9, generator=generator, dtype=torch.float64), each, (1, 4)))
            gamma = int(torch.randint(1, 6, (), generator=generator))
            chain = torch.randint(0, 9, (gamma,), generator=generator).tolist()
            q_draft = torch.randn(gamma, 9, generator=generator, dtype=torch.float64).softmax(-1)
            drafts.append(Draft.chain(chain, q_draft))
            uniforms.append(torch.rand(2, 6, generator=generator, dtype=torch.float64).tolist())
        rows = [
            VerifyRow(draft, toy.params, FixedUniforms(0, *both), toy.prompt, 2)
            for toy, draft, both in zip(toys, drafts, uniforms, strict=True)
        ]
        # A plain row and a greedy one between them have rules of their own.
        others = [VerifyRow(NO_DRAFT, each, FixedUniforms(0, [0.3]), (1, 4), 2) for each in (params[0], greedy())]
        logits = [toy.logits((), draft) for toy, draft in zip(toys, drafts, strict=True)]
        mixed = [rows[0], others[0], rows[1], others[1], rows[2]]
        at = [logits[0], toys[0].table[4:5], logits[1], toys[1].table[4:5], logits[2]]
        verified = RULES[rule](torch.cat(at), mixed)
        assert verified[3].token_ids == [int(toys[1].table[4].argmax())]
        for toy, draft, (emit, accept), got in zip(toys, drafts, uniforms, verified[::2], strict=True):
            distributions = toy.distributions((), draft)
            expected = reference(draft.token_ids, draft.q_draft, distributions, accept, emit)
            assert got.token_ids == expected
            assert got.path == tuple(range(len(expected) - 1))
            accepted += len(got.path)
            for token_id, logprob, row in zip(got.token_ids, got.logprobs, toy.logits((), draft), strict=False):
                assert logprob == pytest.approx(float((row / toy.params.temperature).log_softmax(-1)[token_id]))
    assert accepted > 100


def greedy() -> SamplingParams:
    return SamplingParams(temperature=0.0)


@pytest.mark.parametrize("rule", RULES)
def test_a_greedy_row_takes_the_argmax_whatever_q_says(rule: str) -> None:
    toy = Toy(MARKOV, greedy())
    for chain, emitted in (((0, 0), [0, 0, 0]), ((0, 1), [0, 0]), ((2, 2), [0])):
        draft = Draft.chain(chain, torch.full((2, 4), 0.25, dtype=torch.float64))
        row = VerifyRow(draft, toy.params, FixedUniforms(0, [0.9] * 3, [0.99] * 3), (0,), 1)
        assert RULES[rule](toy.logits((), draft), [row])[0].token_ids == emitted


@pytest.mark.parametrize("rule", RULES)
def test_what_cannot_be_judged_is_refused(rule: str) -> None:
    toy = Toy(MARKOV)
    q_draft = torch.full((2, 4), 0.25, dtype=torch.float64)
    tree = Draft((1, 2), (-1, -1), q_draft)
    with pytest.raises(AssertionError, match="only chains are sampled"):
        RULES[rule](
            toy.logits((), tree), [VerifyRow(tree, toy.params, FixedUniforms(0, [0.5] * 3, [0.5] * 3), (0,), 1)]
        )
    q_draft[1, 2] = 0.0
    lie = Draft.chain((1, 2), q_draft)
    with pytest.raises(AssertionError, match="sampled from"):
        RULES[rule](toy.logits((), lie), [VerifyRow(lie, toy.params, FixedUniforms(0, [0.5] * 3, [0.5] * 3), (0,), 1)])
