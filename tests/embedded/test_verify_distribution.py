"""Exact proofs, without randomness: the target-only walk emits the target's distribution, for chains and trees."""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch

from rollout.embedded.draft import NO_DRAFT, Draft
from rollout.embedded.verification import make_verifier
from rollout.embedded.verification.reference import draw_outside, interval, threshold_reference, walk_reference
from rollout.embedded.verification.verifier import VerifyRow
from rollout.embedded.verification.verify_pass import RuleVerifier
from rollout.embedded.verification.walk import follow_tree, target_only
from slime_spec.config.tree import SpeculativeConfig
from slime_spec.types import SamplingParams
from tests.support.emission import (
    Distribution,
    FixedUniforms,
    Toy,
    cells,
    emission_distribution,
    first_token,
    joint_distribution,
    largest_error,
    total_variation,
    walk_distribution,
)

P_TARGET = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.25, 0.25], dtype=torch.float64) / 16
FLAT = Toy(P_TARGET.log().expand(8, -1))  # the same distribution after every token
MARKOV = Toy((torch.tensor([[5, 3, 1, 1], [1, 6, 2, 1], [2, 2, 4, 2], [1, 1, 1, 7]], dtype=torch.float64) / 10).log())
WALK = RuleVerifier(target_only)


def siblings(token_ids: Sequence[int]) -> Draft:
    return Draft(tuple(token_ids), (-1,) * len(token_ids))


def lossy(**thresholds: float) -> RuleVerifier:
    return make_verifier(SpeculativeConfig(lossy=True, **thresholds), frozenset())


def threshold_distribution(single: float, acc: float, drafted: Sequence[int]) -> Distribution:
    """The distribution of the first token with thresholds; one level of siblings: a uniform accepts, another draws."""
    stacked = P_TARGET[list(drafted)].cumsum(0)
    rest = P_TARGET.clone()
    rest[list(drafted)] = 0.0
    emit = [*(rest.cumsum(0) / rest.sum()).tolist(), *P_TARGET.cumsum(0).tolist()]
    verifier = lossy(accept_threshold_single=single, accept_threshold_acc=acc)
    return first_token(emission_distribution(verifier, FLAT, (), siblings(drafted), [emit], [(stacked / acc).tolist()]))


@pytest.mark.parametrize("drafted", [(), (2,), (0,), (7,), (2, 0, 4), (1, 3, 5, 6), tuple(range(8))])
def test_the_first_token_has_exactly_the_target_distribution_whatever_was_drafted(drafted: tuple[int, ...]) -> None:
    distribution = first_token(walk_distribution(WALK, FLAT, (), siblings(drafted)))
    assert largest_error(distribution, FLAT.autoregressive(1)) < 1e-12


def test_a_sibling_is_accepted_with_its_target_probability() -> None:
    for token_id in range(8):
        start, end = interval(P_TARGET, token_id)
        assert end - start == pytest.approx(float(P_TARGET[token_id]), abs=1e-15)


def test_the_residual_is_the_target_without_the_siblings() -> None:
    removed = (0, 3)
    outside = [i for i in range(8) if i not in removed]
    edges = [0.0, *P_TARGET.cumsum(0).tolist()]
    distribution = torch.zeros(8, dtype=torch.float64)
    for token_id in outside:  # uniforms known to lie outside the siblings' intervals
        distribution[draw_outside(P_TARGET, removed, (edges[token_id] + edges[token_id + 1]) / 2)] += P_TARGET[token_id]
    expected = P_TARGET.clone()
    expected[list(removed)] = 0.0
    assert torch.equal(distribution / distribution.sum(), expected / expected.sum())


def test_duplicate_siblings_are_refused_because_the_cumulative_form_counts_them_twice() -> None:
    with pytest.raises(AssertionError, match="siblings"):
        walk_distribution(WALK, FLAT, (), siblings((2, 0, 0, 0)))
    biased = 0.0
    for start, end in cells([3 / 16, 8 / 16, 13 / 16]):
        draft, uniforms = siblings((2, 0, 0, 0)), [(start + end) / 2] * 2
        biased += (end - start) * (threshold_reference(draft, P_TARGET.expand(5, -1), uniforms, [0.999] * 2)[0] == 0)
    assert biased == pytest.approx(0.8125)


@pytest.mark.parametrize(
    ("single", "acc", "drafted", "tv"),
    [
        (1.0, 0.5, (0,), 0.3125),
        (1.0, 0.9, (0,), 0.0347),
        (1.0, 0.5, (2, 0, 4), 0.5),
        (1.0, 0.9, (2, 0, 4), 0.0625),
        (0.2, 1.0, (2, 0, 4), 0.5),
    ],
)
def test_negative_control_an_acceptance_threshold_below_one_is_caught(
    single: float, acc: float, drafted: tuple[int, ...], tv: float
) -> None:
    distribution = threshold_distribution(single, acc, drafted)
    assert sum(distribution.values()) == pytest.approx(1.0, abs=1e-12)
    assert total_variation(distribution, FLAT.autoregressive(1)) == pytest.approx(tv, abs=1e-4)


def test_thresholds_of_one_are_exact_and_need_no_lossy_mark() -> None:
    assert largest_error(threshold_distribution(1.0, 1.0 - 1e-15, (2, 0, 4)), FLAT.autoregressive(1)) < 1e-12
    assert lossy(accept_threshold_acc=0.9).lossy
    assert not lossy().lossy
    with pytest.raises(AssertionError, match="lossy"):
        make_verifier(SpeculativeConfig(accept_threshold_single=0.5), frozenset())


CHAINS = {0: (1, 2), 1: (0, 3), 2: (2, 2), 3: (0, 0)}, {0: (3, 0), 1: (), 2: (1,), 3: (3, 1)}
TREES = (
    {
        0: Draft((1, 2, 0, 3, 3), (-1, -1, 1, 1, 0)),
        1: Draft((3, 0, 1, 2, 1), (-1, -1, -1, 2, 1)),
        2: siblings((0, 1, 2, 3)),
        3: Draft((0, 0), (-1, 0)),
    },
)
DRAFTS = [*({root: Draft.chain(chain) for root, chain in each.items()} for each in CHAINS), *TREES]
SETTINGS = {
    "plain": SamplingParams(),
    "filters": SamplingParams(temperature=0.7, top_k=3, top_p=0.87, min_p=0.05),
    "penalties": SamplingParams(frequency_penalty=0.4, presence_penalty=0.3, repetition_penalty=1.3),
    "all": SamplingParams(
        temperature=1.3,
        top_p=0.93,
        frequency_penalty=0.7,
        presence_penalty=-0.2,
        repetition_penalty=0.8,
        min_new_tokens=2,
        stop_token_ids=(1,),
        logit_bias=((0, 0.5), (3, -0.4)),
    ),
}


@pytest.mark.parametrize("drafts", DRAFTS, ids=["chains", "other chains", "trees"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_joint_distribution_of_three_tokens_is_the_autoregressive_one(
    setting: str, drafts: dict[int, Draft]
) -> None:
    toy = Toy(MARKOV.table, SETTINGS[setting], prompt=(2, 0), eos_token_ids=frozenset({3}))
    verifier = RuleVerifier(target_only, toy.eos_token_ids)
    distribution = joint_distribution(
        lambda done: walk_distribution(verifier, toy, done, drafts[(*toy.prompt, *done)[-1]]), 3
    )
    assert largest_error(distribution, toy.autoregressive(3)) < 1e-12


def test_negative_control_penalties_frozen_at_the_root_are_caught() -> None:
    toy = Toy(MARKOV.table, SamplingParams(frequency_penalty=2.0))

    def frozen(generated: tuple[int, ...]) -> Distribution:
        """A round whose nodes all have the root's penalties, as SGLang's have."""
        root = (*toy.prompt, *generated)[-1]
        draft = Draft.chain((root, root))
        here = toy.table - 2.0 * torch.tensor([generated.count(i) for i in range(4)], dtype=torch.float64)
        return walk_distribution(WALK, Toy(here), generated, draft)

    assert total_variation(joint_distribution(frozen, 3), toy.autoregressive(3)) > 0.05


@pytest.mark.parametrize("setting", ["plain", "penalties"])
def test_greedy_rounds_emit_the_argmax_of_the_same_adjusted_logits(setting: str) -> None:
    table = 2.0 * torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    greedy = SamplingParams(
        temperature=0.0,
        frequency_penalty=SETTINGS[setting].frequency_penalty * 3,
        repetition_penalty=SETTINGS[setting].repetition_penalty,
    )
    toy = Toy(table, greedy)
    plain: list[int] = []
    while len(plain) < 12:
        plain.append(next(iter(emission_distribution(WALK, toy, plain, NO_DRAFT, [()])))[0])
    drafted: list[int] = []
    while len(drafted) < 12:
        tree = Draft((*plain[len(drafted) : len(drafted) + 1], 5, 4), (-1, 0, 0))
        drafted += next(iter(emission_distribution(WALK, toy, drafted, tree, [()])))
    assert drafted[:12] == plain
    assert setting == "plain" or len(set(plain)) > 2


def random_tree(generator: torch.Generator, nodes: int, likely: Callable[[int], int], vocab: int) -> Draft:
    """Nodes under random parents, siblings distinct; a third of the tokens at random."""
    token_ids: list[int] = []
    parents: list[int] = []
    for index in range(nodes):
        parent = int(torch.randint(-1, index, (), generator=generator)) if index else -1
        taken = [token_ids[i] for i, each in enumerate(parents) if each == parent]
        token = likely(parent + 1) if index % 3 < 2 else int(torch.randint(0, vocab, (), generator=generator))
        if token not in taken:
            token_ids.append(token)
            parents.append(parent)
        else:
            token_ids.append(next(i for i in range(vocab) if i not in taken))
            parents.append(parent)
    return Draft(tuple(token_ids), tuple(parents))


def test_the_fast_path_agrees_with_the_walk_uniform_for_uniform_in_mixed_batches_of_trees() -> None:
    generator = torch.Generator().manual_seed(0)
    accepted = 0
    params = [SamplingParams(), SamplingParams(temperature=0.8, top_k=8, top_p=0.95), SamplingParams(min_p=0.1)]
    for _ in range(150):
        drafts, toys, logits = [], [], []
        for each in range(3):
            toy = Toy(2.0 * torch.randn(11, 11, generator=generator, dtype=torch.float64), params[each], (1, 4))
            nodes = int(torch.randint(0, 7, (), generator=generator))
            likely = toy.table.argmax(-1).tolist()
            draft = random_tree(generator, nodes, lambda node, likely=likely: likely[(4 + node) % 11], 11)
            drafts.append(draft)
            toys.append(toy)
            logits.append(toy.logits((), draft))
        uniforms = torch.rand(3, 8, generator=generator, dtype=torch.float64).tolist()
        fast = WALK(torch.cat(logits), [row_of(*each) for each in zip(toys, drafts, uniforms, strict=True)])
        for toy, draft, emit, verified in zip(toys, drafts, uniforms, fast, strict=True):
            assert verified.token_ids == walk_reference(draft, toy.distributions((), draft), emit)
            assert [draft.token_ids[node] for node in verified.path] == verified.token_ids[:-1]
            accepted += len(verified.path)
    assert accepted > 100


def row_of(toy: Toy, draft: Draft, emit: Sequence[float]) -> VerifyRow:
    return VerifyRow(draft, toy.params, FixedUniforms(0, emit), toy.prompt, len(toy.prompt))


def test_thresholds_agree_with_their_reference_uniform_for_uniform() -> None:
    generator = torch.Generator().manual_seed(3)
    verifier = lossy(accept_threshold_single=0.6, accept_threshold_acc=0.7)
    accepted = 0
    for _ in range(150):
        params = SamplingParams(top_p=float(torch.rand((), generator=generator)) / 2 + 0.5)
        toy = Toy(2.0 * torch.randn(9, 9, generator=generator, dtype=torch.float64), params)
        likely = toy.table.argmax(-1).tolist()
        draft = random_tree(generator, 6, lambda node, likely=likely: likely[node % 9], 9)
        emit, accept = torch.rand(2, 8, generator=generator, dtype=torch.float64).tolist()
        row = VerifyRow(draft, params, FixedUniforms(0, emit, accept), toy.prompt, 1)
        verified = verifier(toy.logits((), draft), [row])[0]
        assert verified.token_ids == threshold_reference(draft, toy.distributions((), draft), accept, emit, 0.6, 0.7)
        accepted += len(verified.path)
    assert accepted > 100


def test_in_a_tree_the_walk_follows_the_accepted_sibling_to_its_children() -> None:
    distribution = torch.full((6, 4), 0.25, dtype=torch.float64)
    tree = Draft((1, 2, 0, 3, 3), (-1, -1, 1, 1, 2))  # root: 1, 2;  under 2: 0, 3;  under 0: 3
    assert walk_reference(tree, distribution, [0.6, 0.1, 0.9, 0.3]) == [2, 0, 3, 1]
    assert walk_reference(tree, distribution, [0.6, 0.9, 0.1]) == [2, 3, 0]
    assert walk_reference(tree, distribution, [0.1, 0.9]) == [0]
    assert follow_tree([2, 9, 0, 3, 8, 1], tree) == ([2, 0, 3, 1], (1, 2, 4))


def test_a_tree_emits_for_a_seed_what_plain_decoding_emits() -> None:
    table = torch.randn(9, 9, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    toy = Toy(table, SamplingParams(temperature=0.9, top_p=0.95))
    tree = Draft((0, 1, 2, 3, 4, 5), (-1, -1, 0, 0, 1, 2))
    for emit in itertools.product((0.05, 0.35, 0.65, 0.93), repeat=4):
        row = row_of(toy, tree, emit)
        emitted = WALK(toy.logits((), tree), [row])[0].token_ids
        plain: list[int] = []
        for uniform in emit[: len(emitted)]:
            plain.append(draw_outside(toy.distribution(plain), (), uniform))
        assert emitted == plain
