"""Rules that verify sampled paths of drafts, in the papers' order, one round at a time and in fp64.

A rule is a list of trials, in the order in which they are made. A trial is a prefix of drafts, the probability that it
passes where every trial before it failed, and the distribution of the token after it if it passes; the last passes for
certain. A round so emits a prefix and one token more, and all that it can emit, and how often, is a sum over trials.

    block       one path x_1 .. x_n of q (arXiv 2403.10444); rollout/embedded/verification/block.py says how.
    greedy      greedy multi-path block verification (arXiv 2602.16961): of K independent paths the one that is last in
                a lexicographic order is verified as a block. The order sorts tokens by p / q after each prefix, so that
                the path goes where the target wants more than the draft gives. The chosen path is distributed as
                    q'(x | s) = [(A + q(s x))^K - A^K] / [(B + q(s))^K - B^K],
                A and B the draft's mass of paths before s x and before s: block verification against q' is exact. A
                trunk, tokens that all paths share, is our addition: there q' is q.
    traversal   of a tree (arXiv 2505.12398): leaf by leaf, the first child's side first. With a = 1 at the root and
                a = min(a p(x) / q(x), 1) after token x, a node is judged when nothing of it is left below, and passes
                with probability a. After a child x and all below it failed, p becomes relu(a p - q) normalised, a
                becomes S / (S + 1 - a), S the sum of relu(a p - q), and q loses x, as siblings are drawn without
                replacement; of siblings drawn with replacement q stays. Of one path it is block verification.

Of the second paper only the abstract and its authors' published program were at hand: the choice of the path is theirs,
the formula and the proof were made here. Paths are drawn from q' and judged against q', so that every order is exact.
All of it is proved by enumeration in tests/embedded/test_path_rules.py; the engine runs the first rule alone, as
``path_study`` found the others to bring too little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Prefix = tuple[int, ...]
NextToken = Callable[[Prefix], Array]  # the distribution [vocab] of the token after a prefix of drafts


@dataclass(frozen=True)
class Trial:
    prefix: Prefix
    passes: float
    after: Array


@dataclass(frozen=True)
class Node:
    """Holds a drafted token and what was drafted after it, in the order in which siblings were drawn."""

    token: int
    children: tuple[Node, ...] = ()


def block(path: Prefix, p: Sequence[Array], q: Sequence[Array]) -> list[Trial]:
    """Return the trials of a path, the longest prefix first; ``p[i]`` and ``q[i]`` follow its first i tokens."""
    ratios = [1.0]
    for i, x in enumerate(path):
        ratios.append(min(ratios[-1] * p[i][x] / q[i][x], 1.0))
    trials = [Trial(path, ratios[-1], p[len(path)])]
    for i in reversed(range(len(path))):
        left = np.maximum(ratios[i] * p[i] - q[i], 0.0)
        trials.append(Trial(path[:i], pass_probability(left.sum(), ratios[i]), normalised(left, p[i])))
    return trials


def greedy(paths: Sequence[Prefix], p: NextToken, q: NextToken, trunk: int = 0) -> list[Trial]:
    """Return the trials of K paths of equal length, drawn independently after the ``trunk`` tokens that they share."""
    alive, prefix = list(paths), paths[0][:trunk]
    skewed = [q(prefix[:i]) for i in range(trunk)]
    before, mass = 0.0, 1.0  # of the paths before the prefix, and of those that begin with it
    while len(prefix) < len(paths[0]):
        here, of_draft = len(prefix), q(prefix)
        order = np.argsort(np.divide(p(prefix), of_draft, out=-np.ones_like(of_draft), where=of_draft > 0), stable=True)
        rank = np.argsort(order)
        up_to = np.cumsum(of_draft[order])[rank]
        low, high = before + mass * (up_to - of_draft), before + mass * up_to
        skewed.append(of_draft * power_slope(high, low, len(paths)) / power_slope(before + mass, before, len(paths)))
        token = max((path[here] for path in alive), key=lambda x: rank[x])
        alive = [path for path in alive if path[here] == token]
        prefix, before, mass = (*prefix, token), low[token], mass * of_draft[token]
    return block(prefix, [p(prefix[:i]) for i in range(len(prefix) + 1)], skewed)


def traversal(children: Sequence[Node], p: NextToken, q: NextToken, replaced: bool = False) -> Iterator[Trial]:
    """Yield the trials of a tree of ``children`` of the root; ``replaced``: siblings were drawn with replacement."""

    def visit(prefix: Prefix, below: Sequence[Node], passes: float) -> Iterator[Trial]:
        of_target, of_draft = p(prefix), q(prefix) if below else None
        for node in below:
            assert of_draft is not None, "drafts came from a distribution"
            ratio = of_target[node.token] / of_draft[node.token]
            yield from visit((*prefix, node.token), node.children, min(passes * ratio, 1.0))
            left = np.maximum(passes * of_target - of_draft, 0.0)
            passes, of_target = pass_probability(left.sum(), passes), normalised(left, of_target)
            if not replaced:
                of_draft = of_draft * (np.arange(len(of_draft)) != node.token)
                of_draft = normalised(of_draft, of_draft)
        yield Trial(prefix, passes, of_target)

    return visit((), children, 1.0)


def chain(path: Prefix) -> Node:
    return Node(path[0], (chain(path[1:]),) if path[1:] else ())


def outcomes(trials: Iterable[Trial]) -> Iterator[tuple[Trial, float]]:
    """Yield every trial with the probability that it is the one that passes."""
    left = 1.0
    for trial in trials:
        yield trial, left * trial.passes
        left *= 1.0 - trial.passes
    assert left < 1e-9, "the last trial passes"


def pass_probability(residual_sum: float, ratio: float) -> float:
    return float(residual_sum / (residual_sum + 1.0 - ratio)) if residual_sum + 1.0 - ratio > 0.0 else 1.0


def normalised(weights: Array, otherwise: Array) -> Array:
    total = weights.sum()
    return weights / total if total > 0.0 else otherwise


def power_slope(high: Array | float, low: Array | float, power: int) -> Array | float:
    """Return (high^n - low^n) / (high - low), which loses no digits where the two are near."""
    return sum(high**i * low ** (power - 1 - i) for i in range(power))
