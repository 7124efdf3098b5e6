"""Exact proofs, without randomness: the walk emits the target's law, and the fast path is the walk."""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch

from rollout.embedded.sampler import inverse_cdf, sampling_law
from rollout.embedded.verify import draw_residual, follow_chain, interval, walk_reference
from slime_spec.interfaces import Draft
from slime_spec.types import SamplingParams

P_TARGET = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.25, 0.25], dtype=torch.float64) / 16
Q_DRAFT = torch.tensor([6.0, 4.0, 2.0, 1.0, 1.0, 0.5, 0.3, 0.2], dtype=torch.float64) / 15
Walk = Callable[[Sequence[int], torch.Tensor, float], int]


def siblings(token_ids: Sequence[int]) -> Draft:
    return Draft(tuple(token_ids), (-1,) * len(token_ids))


def first_token_law(walk: Walk, drafted: Sequence[int], law: torch.Tensor, cuts: Sequence[float]) -> torch.Tensor:
    """The law of the emitted token, integrated exactly: between two cuts the outcome does not depend on the coin."""
    emitted = torch.zeros_like(law)
    edges = sorted({0.0, 1.0, *(cut for cut in cuts if 0.0 < cut < 1.0)})
    for start, end in itertools.pairwise(edges):
        emitted[walk(drafted, law, (start + end) / 2)] += end - start
    return emitted


def our_walk(drafted: Sequence[int], law: torch.Tensor, coin: float) -> int:
    return walk_reference(siblings(drafted), law.expand(1 + len(drafted), -1), [coin] * 2)[0]


def cumulative_walk(threshold_acc: float) -> Walk:
    """SGLang's form: siblings stacked from zero; below threshold 1 it favours drafts on purpose."""

    def walk(drafted: Sequence[int], law: torch.Tensor, coin: float) -> int:
        stacked = 0.0
        for token_id in drafted:
            stacked += float(law[token_id])
            if coin < stacked / threshold_acc:
                return token_id
        rest = law.clone()
        rest[list(drafted)] = 0.0
        spread = (coin - stacked / threshold_acc) / (1 - stacked / threshold_acc)
        return int(torch.searchsorted(rest.cumsum(0) / rest.sum(), torch.tensor(spread, dtype=law.dtype), right=True))

    return walk


def cuts_of(law: torch.Tensor) -> list[float]:
    return law.cumsum(0).tolist()


@pytest.mark.parametrize("drafted", [(), (2,), (0,), (7,), (2, 0, 4), (1, 3, 5, 6), tuple(range(8))])
def test_the_first_token_has_exactly_the_target_law_whatever_was_drafted(drafted: tuple[int, ...]) -> None:
    law = first_token_law(our_walk, drafted, P_TARGET, cuts_of(P_TARGET))
    assert (law - P_TARGET).abs().max() < 1e-12


def test_a_sibling_is_accepted_with_its_target_probability() -> None:
    for token_id in range(8):
        start, end = interval(P_TARGET, token_id)
        assert end - start == pytest.approx(float(P_TARGET[token_id]), abs=1e-15)


def test_the_residual_is_the_target_without_the_siblings() -> None:
    removed = (0, 3)
    outside = [i for i in range(8) if i not in removed]
    edges = [0.0, *cuts_of(P_TARGET)]
    law = torch.zeros(8, dtype=torch.float64)
    for token_id in outside:  # coins known to lie outside the siblings' intervals
        law[draw_residual(P_TARGET, removed, (edges[token_id] + edges[token_id + 1]) / 2)] += P_TARGET[token_id]
    expected = P_TARGET.clone()
    expected[list(removed)] = 0.0
    assert torch.equal(law / law.sum(), expected / expected.sum())


def test_duplicate_siblings_do_not_change_our_law_but_break_the_cumulative_form() -> None:
    duplicated = (2, 0, 0, 0)
    assert (first_token_law(our_walk, duplicated, P_TARGET, cuts_of(P_TARGET)) - P_TARGET).abs().max() < 1e-12
    stacked = P_TARGET[list(duplicated)].cumsum(0).tolist()
    biased = first_token_law(cumulative_walk(1.0), duplicated, P_TARGET, stacked)
    assert float(biased[0]) == pytest.approx(0.8125)


@pytest.mark.parametrize(("threshold_acc", "bias"), [(0.5, 0.3125), (0.9, 0.0347)])
def test_negative_control_an_acceptance_threshold_below_one_is_caught(threshold_acc: float, bias: float) -> None:
    accept = float(P_TARGET[0]) / threshold_acc
    rest = P_TARGET.clone()
    rest[0] = 0.0
    cuts = [accept, *(accept + (1 - accept) * rest.cumsum(0) / rest.sum()).tolist()]
    law = first_token_law(cumulative_walk(threshold_acc), (0,), P_TARGET, cuts)
    assert (law - P_TARGET).abs().max() == pytest.approx(bias, abs=1e-4)


def test_negative_control_softmax_q_with_an_argmax_draft_is_caught() -> None:
    drafted = int(Q_DRAFT.argmax())
    accept = min(1.0, float(P_TARGET[drafted] / Q_DRAFT[drafted]))
    residual = (P_TARGET - Q_DRAFT).clamp(min=0)
    law = (1 - accept) * residual / residual.sum()
    law[drafted] += accept
    assert float((law - P_TARGET).abs().sum() / 2) == pytest.approx(0.46875, abs=1e-6)
    one_hot = first_token_law(our_walk, (drafted,), P_TARGET, cuts_of(P_TARGET))
    assert (one_hot - P_TARGET).abs().max() < 1e-12


def markov_rounds(target: torch.Tensor, draft_of: Callable[[int], Sequence[int]], coins: Sequence[float]) -> list[int]:
    """Three tokens by rounds of drafted chains, from root token 0; coin t decides token t."""
    tokens: list[int] = [0]
    while len(tokens) < 4:
        chain = list(draft_of(tokens[-1]))[: 3 - len(tokens)] if len(tokens) < 3 else []
        draft = Draft(tuple(chain), tuple(range(-1, len(chain) - 1)))
        p_target = target[[tokens[-1], *chain]]
        tokens += walk_reference(draft, p_target, coins[len(tokens) - 1 :])
    return tokens[1:4]


@pytest.mark.parametrize(
    "drafts", [{0: (1, 2), 1: (0, 3), 2: (2, 2), 3: (0, 0)}, {0: (3, 0), 1: (), 2: (1,), 3: (3, 1)}]
)
def test_the_joint_law_of_three_tokens_is_the_autoregressive_one(drafts: dict[int, tuple[int, ...]]) -> None:
    target = torch.tensor([[5, 3, 1, 1], [1, 6, 2, 1], [2, 2, 4, 2], [1, 1, 1, 7]], dtype=torch.float64) / 10
    edges = sorted({0.0, 1.0, *target.cumsum(1).flatten().clamp(max=1.0).tolist()})
    cells = [((a + b) / 2, b - a) for a, b in itertools.pairwise(edges) if b - a > 1e-12]
    joint = torch.zeros(4, 4, 4, dtype=torch.float64)
    for (c0, w0), (c1, w1), (c2, w2) in itertools.product(cells, repeat=3):
        x, y, z = markov_rounds(target, lambda token: drafts[token], [c0, c1, c2])
        joint[x, y, z] += w0 * w1 * w2
    expected = torch.einsum("x,xy,yz->xyz", target[0], target, target)
    assert (joint - expected).abs().max() < 1e-12


def test_the_fast_path_agrees_with_the_walk_coin_for_coin() -> None:
    generator = torch.Generator().manual_seed(0)
    accepted = 0
    for _ in range(600):
        length, vocab = int(torch.randint(0, 6, (), generator=generator)), 11
        logits = 2.0 * torch.randn(length + 1, vocab, generator=generator)
        chain = [
            int(logits[i].argmax()) if i % 3 < 2 else int(torch.randint(0, vocab, (), generator=generator))
            for i in range(length)
        ]
        params = [SamplingParams(top_k=8, top_p=0.95)] * (length + 1)
        coins = torch.rand(length + 1, generator=generator, dtype=torch.float64)
        _, p_target = sampling_law(logits, params)
        fast = follow_chain(inverse_cdf(p_target, coins).tolist(), chain)
        law = p_target.double() / p_target.double().sum(-1, keepdim=True)
        draft = Draft(tuple(chain), tuple(range(-1, length - 1)))
        assert fast == walk_reference(draft, law, coins.tolist())
        accepted += len(fast) - 1
    assert accepted > 100


def test_in_a_tree_the_walk_follows_the_accepted_sibling_to_its_children() -> None:
    law = torch.full((6, 4), 0.25, dtype=torch.float64)
    tree = Draft((1, 2, 0, 3, 3), (-1, -1, 1, 1, 2))  # root: 1, 2;  under 2: 0, 3;  under 0: 3
    assert walk_reference(tree, law, [0.6, 0.1, 0.9, 0.3]) == [2, 0, 3, 1]
    assert walk_reference(tree, law, [0.6, 0.9, 0.1]) == [2, 3, 0]
    assert walk_reference(tree, law, [0.1, 0.9]) == [0]
