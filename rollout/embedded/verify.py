"""Verification: which drafted tokens stand, such that the output has exactly the target's law.

The rule is the target-only walk: at a node, each child x is accepted with probability p_target(x) (given that no
earlier sibling was), and when none is, the token comes from p_target without the siblings. It is SGLang's default and,
for children chosen without looking at the coins, exact whatever drafted them (SpecInfer, EAGLE with q = 1).

One coin per node decides everything: child x is accepted when the coin falls into x's interval of the cumulative law
in vocabulary order, an event of probability p_target(x), disjoint from its siblings'. What is left of the unit
interval belongs to the other tokens, each in proportion to its p_target: the residual law. So the walk emits, at every
position, the very token plain decoding would have drawn with that position's coin. Speculation thus changes no
output for a given seed (but for coins within rounding, about 1e-6, of an interval's end: logits of passes of different
sizes differ in their last bits), and the fast path is: draw a token at every node, follow the draft while they agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from slime_spec.interfaces import Draft

# (tokens drawn at every node of a row, that row's drafted chain) -> the tokens to emit, accepted drafts first
ChainRule = Callable[[Sequence[int], Sequence[int]], list[int]]


def follow_chain(drawn: Sequence[int], chain: Sequence[int]) -> list[int]:
    """The tokens a round emits: ``drawn[i]`` was drawn after the root and i drafts, ``chain[i]`` is the next draft.

    The last one is the correction of the first draft that fell, or the bonus token when all stand.
    """
    for num_accepted, drafted in enumerate(chain):
        if drawn[num_accepted] != drafted:
            return list(drawn[: num_accepted + 1])
    return list(drawn[: len(chain) + 1])


def walk_reference(draft: Draft, p_target: torch.Tensor, coins: Sequence[float]) -> list[int]:
    """The walk in the paper's order, one node at a time: the emitted tokens, accepted ones first.

    ``p_target`` [1 + nodes, vocab] fp64 holds the normalised law after the root (row 0) and after node i (row i + 1);
    ``coins[d]`` decides at depth d. The last token is the correction, or the bonus where a leaf was reached.
    """
    emitted: list[int] = []
    node = -1
    while True:
        law, coin = p_target[node + 1], coins[len(emitted)]
        children = [i for i, parent in enumerate(draft.parents) if parent == node]
        accepted = None
        for child in children:
            start, end = interval(law, draft.token_ids[child])
            if start <= coin < end:
                accepted = child
                break
        if accepted is None:
            siblings = [draft.token_ids[child] for child in children]
            return [*emitted, draw_residual(law, siblings, coin)]
        emitted.append(draft.token_ids[accepted])
        node = accepted


def interval(law: torch.Tensor, token_id: int) -> tuple[float, float]:
    """The part of [0, 1) that belongs to a token: lengths are probabilities, in vocabulary order."""
    end = law.cumsum(dim=0)
    return (float(end[token_id - 1]) if token_id else 0.0), float(end[token_id])


def draw_residual(law: torch.Tensor, removed: Sequence[int], coin: float) -> int:
    """The token outside ``removed`` whose interval holds the coin, which is known to lie in none of theirs."""
    for token_id in range(law.shape[0]):
        start, end = interval(law, token_id)
        if token_id not in removed and start <= coin < end:
            return token_id
    positive = [i for i in range(law.shape[0]) if law[i] > 0 and i not in removed]
    return positive[-1]  # the coin lies in the rounding error above the last interval
