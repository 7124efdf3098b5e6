"""The exact distribution of what a verifier emits: between two cuts no outcome changes, so cells are summed up.

That a cut is where the verifier changes its mind is checked too: each cell is judged just inside both its ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from rollout.embedded.draft import Draft
from rollout.embedded.uniforms import Uniforms
from rollout.embedded.verification.reference import distribution_reference
from rollout.embedded.verification.verifier import Verifier, VerifyRow
from slime_spec.types import SamplingParams

Cuts = Iterable[float]
Distribution = dict[tuple[int, ...], float]
PLAIN = SamplingParams()
INSIDE = 1e-13  # how far from its end a cell is judged; rounding in fp64 is a hundredth of it


class FixedUniforms(Uniforms):
    """Uniforms a test chose, from the token ``num_generated`` on."""

    def __init__(self, num_generated: int, emit: Sequence[float], accept: Sequence[float] = ()) -> None:
        self.emit = [0.0] * num_generated + list(emit)
        self._accept = [0.0] * num_generated + list(accept)

    def accept_of_round(self, num_generated: int) -> Sequence[float]:
        return self._accept


@dataclass(frozen=True)
class Toy:
    """A Markov target: ``table[a]`` are the logits after token a, whatever came before; a request's own settings."""

    table: torch.Tensor  # [vocab, vocab] fp64
    params: SamplingParams = PLAIN
    prompt: tuple[int, ...] = (0,)
    eos_token_ids: frozenset[int] = frozenset()

    def distribution(self, generated: Sequence[int]) -> torch.Tensor:
        """What plain decoding draws from after ``generated``, by the slow reference."""
        last = (*self.prompt, *generated)[-1]
        return distribution_reference(self.table[last], self.params, self.prompt, generated, self.eos_token_ids)

    def distributions(self, generated: Sequence[int], draft: Draft) -> torch.Tensor:
        """The same at the root and at every node of a draft."""
        paths: list[tuple[int, ...]] = [()]
        for token_id, parent in zip(draft.token_ids, draft.parents, strict=True):
            paths.append((*paths[parent + 1], token_id))
        return torch.stack([self.distribution([*generated, *path]) for path in paths])

    def logits(self, generated: Sequence[int], draft: Draft) -> torch.Tensor:
        return self.table[[(*self.prompt, *generated)[-1], *draft.token_ids]]

    def autoregressive(self, num_tokens: int) -> Distribution:
        """The distribution of plain decoding's first tokens."""
        distributions: Distribution = {(): 1.0}
        for _ in range(num_tokens):
            distributions = {
                (*tokens, x): weight * float(p)
                for tokens, weight in distributions.items()
                for x, p in enumerate(self.distribution(tokens))
                if p > 0
            }
        return distributions


def cells(cuts: Cuts) -> list[tuple[float, float]]:
    """(start, end) of the pieces of [0, 1) between cuts."""
    edges = sorted({0.0, 1.0, *(float(cut) for cut in cuts if 0.0 < cut < 1.0)})
    # Cuts that agree but for rounding are one.
    edges = [edge for edge, after in itertools.pairwise([*edges, 2.0]) if after - edge > 4 * INSIDE]
    return list(itertools.pairwise(edges))


def emission_distribution(
    verifier: Verifier,
    toy: Toy,
    generated: Sequence[int],
    draft: Draft,
    emit_cuts: Sequence[Cuts],
    accept_cuts: Sequence[Cuts] = (),
) -> Distribution:
    """The distribution of a round's emitted tokens; ``emit_cuts[d]`` and ``accept_cuts[d]`` are those of depth d.

    One entry of ``emit_cuts`` serves every depth: right where a round draws one token only, its last.
    """
    committed = [*toy.prompt, *generated]
    shared = len(emit_cuts) == 1
    rows, weights = [], []
    for cell in itertools.product(*(cells(cuts) for cuts in (*emit_cuts, *accept_cuts))):
        weights.append(torch.tensor([end - start for start, end in cell], dtype=torch.float64).prod().item())
        for uniforms in ([start + INSIDE for start, _ in cell], [end - INSIDE for _, end in cell]):
            emit = uniforms[:1] * (1 + len(draft.token_ids)) if shared else uniforms[: len(emit_cuts)]
            chosen = FixedUniforms(len(generated), emit, uniforms[len(emit_cuts) :])
            rows.append(VerifyRow(draft, toy.params, chosen, committed, len(toy.prompt)))
    judged = [tuple(each.token_ids) for each in verifier(toy.logits(generated, draft).repeat(len(rows), 1), rows)]
    distribution: Distribution = {}
    for at_start, at_end, weight in zip(judged[::2], judged[1::2], weights, strict=True):
        assert at_start == at_end, "the verifier changes its mind elsewhere than at the cuts"
        distribution[at_start] = distribution.get(at_start, 0.0) + weight
    return distribution


def walk_distribution(verifier: Verifier, toy: Toy, generated: Sequence[int], draft: Draft) -> Distribution:
    """Of a target-only round: at each depth, the cuts of every node there."""
    distributions, depths = toy.distributions(generated, draft), [0]
    for parent in draft.parents:
        depths.append(depths[parent + 1] + 1)
    cuts = [distributions[[node for node, d in enumerate(depths) if d == depth]] for depth in range(max(depths) + 1)]
    return emission_distribution(verifier, toy, generated, draft, [each.cumsum(1).flatten().tolist() for each in cuts])


def chain_distribution(verifier: Verifier, toy: Toy, generated: Sequence[int], draft: Draft) -> Distribution:
    """Of a round of rejection sampling or block verification of one drafted chain, given the chain."""
    p, q = toy.distributions(generated, draft), draft.q_draft
    scales = prefix_ratios(p, q, draft.token_ids)
    residuals = [p[-1], *((scale * p[i] - q[i]).clamp(min=0) for i, scale in enumerate(scales[:-1]))]
    residuals += [(p[i] - q[i]).clamp(min=0) for i in range(len(q))]
    emit = [cut for each in residuals if each.sum() > 0 for cut in (each / each.sum()).cumsum(0).tolist()]
    token_wise = [float(p[i, x] / q[i, x]) for i, x in enumerate(draft.token_ids)]
    block = pass_probabilities(p, q, draft.token_ids)
    return emission_distribution(verifier, toy, generated, draft, [emit], list(zip(token_wise, block, strict=True)))


def prefix_ratios(p: torch.Tensor, q: torch.Tensor, drafted: Sequence[int]) -> list[float]:
    """Block verification's P_0 .. P_gamma."""
    ratios = [1.0]
    for i, token_id in enumerate(drafted):
        ratios.append(min(1.0, ratios[-1] * float(p[i, token_id] / q[i, token_id])))
    return ratios


def pass_probabilities(p: torch.Tensor, q: torch.Tensor, drafted: Sequence[int]) -> list[float]:
    """Block verification's h_1 .. h_gamma."""
    ratios = prefix_ratios(p, q, drafted)
    left = [float((ratios[i] * p[i] - q[i]).clamp(min=0).sum()) for i in range(1, len(drafted))]
    return [s / (s + 1 - ratio) if s + 1 > ratio else 1.0 for s, ratio in zip(left, ratios[1:], strict=False)] + ratios[
        -1:
    ]


def sampled_drafts(q_of: Callable[[int], torch.Tensor], root: int, gamma: int) -> list[tuple[Draft, float]]:
    """Every chain a Markov drafter can sample from ``root``, with its probability."""
    drafts = []
    for chain in itertools.product(range(len(q_of(root))), repeat=gamma):
        rows = torch.stack([q_of(token_id) for token_id in (root, *chain[:-1])])
        weight = float(rows.gather(1, torch.tensor(chain).unsqueeze(1)).prod())
        if weight > 0:
            drafts.append((Draft.chain(chain, rows), weight))
    return drafts


def joint_distribution(round_distribution: Callable[[tuple[int, ...]], Distribution], num_tokens: int) -> Distribution:
    """The distribution of the first tokens, round by round; ``round_distribution`` is given the tokens so far."""
    done: Distribution = {}
    open_ends: Distribution = {(): 1.0}
    while open_ends:
        generated, weight = open_ends.popitem()
        for emitted, probability in round_distribution(generated).items():
            tokens = (*generated, *emitted)
            where = done if len(tokens) >= num_tokens else open_ends
            tokens = tokens[:num_tokens]
            where[tokens] = where.get(tokens, 0.0) + weight * probability
    return done


def largest_error(left: Distribution, right: Distribution) -> float:
    return max(abs(left.get(tokens, 0.0) - right.get(tokens, 0.0)) for tokens in left.keys() | right.keys())


def total_variation(left: Distribution, right: Distribution) -> float:
    return sum(abs(left.get(tokens, 0.0) - right.get(tokens, 0.0)) for tokens in left.keys() | right.keys()) / 2


def first_token(distribution: Distribution) -> Distribution:
    marginal: Distribution = {}
    for tokens, weight in distribution.items():
        marginal[tokens[:1]] = marginal.get(tokens[:1], 0.0) + weight
    return marginal


def mean_accepted(distribution: Distribution) -> float:
    """Drafts a round accepts on average: all but its last token."""
    return sum((len(tokens) - 1) * weight for tokens, weight in distribution.items())
