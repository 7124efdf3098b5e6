"""The target-only walk decides which drafted tokens stand, so that the output has exactly the target's distribution.

At a node, each child x is accepted with probability p_target(x) (given that no earlier sibling was), and when none is,
the token comes from p_target without the siblings. It is SGLang's default and, for children chosen without looking at
the uniforms, exact whatever drafted them (SpecInfer, EAGLE with q = 1).

One uniform per position decides everything: child x is accepted when the uniform of its depth falls into x's interval
of the cumulative distribution in vocabulary order, an event of probability p_target(x), disjoint from its siblings'.
What is left of the unit interval belongs to the other tokens, each in proportion to its p_target: the residual
distribution. So the walk emits, at every position, the very token plain decoding would have drawn with that position's
uniform, whatever tree was drafted. Speculation thus changes no output for a given seed (but for uniforms within
rounding, about 1e-6, of an interval's end: logits of passes of different sizes differ in their last bits), and the fast
path is: draw a token at every node, follow the children that equal it. walk_reference takes the paper's order.

With Gumbel coupling a race with the position's noise draws the token instead (see race), an event of probability
p_target(x) as well, and everything else stays: whichever of the two draws, the draft has no part in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from rollout.embedded.draft import Draft
from rollout.embedded.verification.distributions import sampling_distribution
from rollout.embedded.verification.draw import argmax, inverse_cdf
from rollout.embedded.verification.race import race
from rollout.embedded.verification.verifier import Verified, VerifyRow
from rollout.embedded.verification.verify_pass import Emission, Pass, Rule, Scratch, with_logprobs
from slime_spec.types import is_greedy

# (the token drawn at every node of a row, root first; its draft) -> (tokens to emit, accepted nodes)
Follow = Callable[[Sequence[int], Draft], tuple[list[int], tuple[int, ...]]]


# (the distribution [nodes, vocab] of a pass, the pass) -> the token drawn at every node [nodes]
DrawNodes = Callable[[torch.Tensor, Pass], torch.Tensor]


def target_only(row: VerifyRow) -> Rule:
    return walk_greedy if is_greedy(row.params.temperature) else walk_sampled


def gumbel_coupling(row: VerifyRow) -> Rule:
    return walk_greedy if is_greedy(row.params.temperature) else walk_raced


def follow_tree(drawn: Sequence[int], draft: Draft) -> tuple[list[int], tuple[int, ...]]:
    """Walk from the root to the child that equals the token drawn there, and on; the last token has no such child."""
    if not draft.token_ids:
        return [drawn[0]], ()
    child_at = dict(zip(zip(draft.parents, draft.token_ids, strict=True), range(len(draft.parents)), strict=True))
    assert len(child_at) == len(draft.parents), "siblings of a draft must be distinct tokens"
    path: list[int] = []
    emitted = [drawn[0]]
    node = child_at.get((-1, drawn[0]))
    while node is not None:
        path.append(node)
        emitted.append(drawn[node + 1])
        node = child_at.get((node, drawn[node + 1]))
    return emitted, tuple(path)


def walk_greedy(verify_pass: Pass, scratch: Scratch, follow: Follow = follow_tree) -> list[Verified]:
    """Walk rows at temperature 0: the argmax at every node; distributions are computed only for emitted tokens."""
    logits = verify_pass.logits
    emissions = _follow_all(verify_pass, argmax(logits).tolist(), follow)
    nodes = [node for emission in emissions for node in emission.nodes]
    index = torch.tensor(nodes, device=logits.device)
    reached = torch.index_select(logits, 0, index, out=scratch.take("reached", len(nodes), logits))
    weights = torch.softmax(reached, dim=-1, out=scratch.take("distribution", len(nodes), logits))
    return with_logprobs(emissions, weights, range(len(nodes)))


def walk_sampled(verify_pass: Pass, scratch: Scratch, follow: Follow = follow_tree) -> list[Verified]:
    """Walk rows that sample: every node's token is drawn with the uniform of its depth."""
    return _walk_drawn(verify_pass, scratch, _by_uniforms, follow)


def walk_raced(verify_pass: Pass, scratch: Scratch, follow: Follow = follow_tree) -> list[Verified]:
    """Walk rows that sample: every node's token is drawn by a race with the noise of its depth."""
    return _walk_drawn(verify_pass, scratch, _by_race, follow)


def _walk_drawn(verify_pass: Pass, scratch: Scratch, draw: DrawNodes, follow: Follow) -> list[Verified]:
    logits = verify_pass.logits
    weights = sampling_distribution(logits, verify_pass.params, scratch.take("distribution", len(logits), logits))
    emissions = _follow_all(verify_pass, draw(weights, verify_pass).tolist(), follow)
    return with_logprobs(emissions, weights, [node for emission in emissions for node in emission.nodes])


def _by_uniforms(weights: torch.Tensor, verify_pass: Pass) -> torch.Tensor:
    uniforms = [row.uniforms.emit[row.num_generated + depth] for row in verify_pass.rows for depth in row.depths()]
    return inverse_cdf(weights, torch.tensor(uniforms, dtype=torch.float64, device=weights.device))


def _by_race(weights: torch.Tensor, verify_pass: Pass) -> torch.Tensor:
    keys = [row.uniforms.noise.key(row.num_generated + depth) for row in verify_pass.rows for depth in row.depths()]
    return race(weights, np.array(keys, np.uint64))


def _follow_all(verify_pass: Pass, drawn: Sequence[int], follow: Follow) -> list[Emission]:
    return [
        Emission(*follow(drawn[root : root + row.num_nodes], row.draft.read()), root)
        for row, root in zip(verify_pass.rows, verify_pass.roots, strict=True)
    ]
