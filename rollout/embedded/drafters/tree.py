"""EAGLE-2's dynamic draft trees grow as SGLang builds them, for a whole batch at once; a slow reference stands beside.

Every step the K best leaves each get their K likeliest children; all K·K enter the pool, the K best of them are the
next leaves. A node's score is its path's log probability under the draft (temperature never applies). The best nodes of
the pool are kept, in pool order: parents come before children, and a score never exceeds its parent's.

    step 1   K nodes below the root
    step s   K·K nodes, scored by path            pool: K + (S - 1) K²        ties: the earlier in the pool

Where a leaf's logits are not finite numbers, its children score -inf; no node of that score is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from rollout.embedded.draft import Draft
from rollout.embedded.drafters.step import DraftStep, DraftVocab, Heads
from rollout.embedded.drafting import DraftContext
from rollout.embedded.plan import RowSpan
from rollout.embedded.transfer import uploaded
from rollout.embedded.unread import ENDED, Branches, DraftsOnDevice, UnreadDraft

# (a level's tokens [rows * width], the hidden states they follow, the number of the level, from 1, the level's
# parents among the leaves of the level before [rows, width]: None at the first level) -> what comes after each token
LevelStep = Callable[[torch.Tensor, torch.Tensor, int, torch.Tensor | None], Heads]


@dataclass
class Pool:
    """Holds all candidates so far, per row [rows, nodes]: its token, its parent (-1: the root) and its log score."""

    width: int  # nodes of the first level; every further level has its square
    tokens: torch.Tensor
    parents: torch.Tensor
    scores: torch.Tensor
    nonfinite: torch.Tensor  # [rows], whether logits of a row's leaf were not finite numbers

    @property
    def depths(self) -> torch.Tensor:
        """Return every candidate's depth [nodes], 1 below the root."""
        place = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return (place - self.width).div(self.width**2, rounding_mode="floor").clamp(min=-1) + 2

    def extend(
        self, tokens: torch.Tensor, parents: torch.Tensor, scores: torch.Tensor, nonfinite: torch.Tensor
    ) -> None:
        self.nonfinite = self.nonfinite | nonfinite
        self.tokens = torch.cat([self.tokens, tokens], dim=1)
        self.parents = torch.cat([self.parents, parents], dim=1)
        self.scores = torch.cat([self.scores, scores], dim=1)


@dataclass(frozen=True)
class TreeLimits:
    """Holds how many nodes [rows] each row's tree may have, and how deep [rows] they may lie."""

    nodes: npt.NDArray[np.int64]
    depths: npt.NDArray[np.int64]

    @classmethod
    def of(cls, contexts: Sequence[DraftContext], most: int) -> TreeLimits:
        nodes = [min(most, each.max_draft_tokens) for each in contexts]
        return cls(np.array(nodes, np.int64), np.array([each.max_depth for each in contexts], np.int64))


def grow_trees(
    first: Heads,
    step: DraftStep,
    next_slots: Sequence[RowSpan],
    contexts: Sequence[DraftContext],
    num_steps: int,
    topk: int,
    num_draft_tokens: int,
    vocab: DraftVocab,
) -> list[UnreadDraft]:
    """Return a tree per row, of ``num_draft_tokens`` - 1 nodes or as many as its context allows.

    ``first`` follows each row's root; ``next_slots[row]`` is where the first leaf's keys go, the others after it.
    """
    lineages: list[tuple[int, ...]] = [()] * len(next_slots)  # parents within the draft's cache

    def level_step(tokens: torch.Tensor, hidden: torch.Tensor, level: int, parents: torch.Tensor | None) -> Heads:
        width = len(tokens) // len(next_slots)
        above = [[-1] * width] * len(next_slots) if parents is None else (parents + (level - 2) * width).tolist()
        lineages[:] = [(*lineage, *of_level) for lineage, of_level in zip(lineages, above, strict=True)]
        spans = [
            replace(slot, start=slot.start + (level - 1) * width, count=width, parents=lineage)
            for slot, lineage in zip(next_slots, lineages, strict=True)
        ]
        return step(tokens, hidden, spans)

    pool = grow_pool(first, level_step, tree_steps(contexts, num_steps), topk, vocab)
    limits = TreeLimits.of(contexts, num_draft_tokens - 1)
    nodes, depths = uploaded(first.logits.device, limits.nodes, limits.depths)
    return trees(best_nodes(pool, nodes, depths, num_draft_tokens - 1), limits, pool.width)


def tree_steps(contexts: Sequence[DraftContext], num_steps: int) -> int:
    """Return the number of levels that some context has room for."""
    return min(num_steps, max(context.max_depth for context in contexts))


def trees(drafts: DraftsOnDevice, limits: TreeLimits, width: int) -> list[UnreadDraft]:
    """Return the drafts of ``best_nodes``."""
    most = limits.nodes.clip(max=width + (limits.depths - 1) * width**2).clip(max=drafts.num_nodes)
    return [UnreadDraft(drafts, row, num_tokens) for row, num_tokens in enumerate(most.tolist())]


def grow_pool(first: Heads, step: LevelStep, num_steps: int, topk: int, vocab: DraftVocab) -> Pool:
    """Return the candidates of ``num_steps`` levels, without a read of the device."""
    rows, width = first.logits.shape[0], min(topk, first.logits.shape[1])
    scores, tokens, nonfinite = _children(first.logits, width, vocab)
    pool = Pool(width, tokens, torch.full_like(tokens, -1), scores, nonfinite)
    leaves = torch.arange(width, device=scores.device).expand(rows, -1)  # in the pool
    hidden = first.hidden.repeat_interleave(width, dim=0)
    parents: torch.Tensor | None = None  # among the level's leaves
    for level in range(1, num_steps):
        heads = step(tokens.flatten(), hidden, level, parents)
        log_p, children, nonfinite = _children(heads.logits, width, vocab)
        candidates = (scores.reshape(-1, 1) + log_p).view(rows, -1)
        before = pool.tokens.shape[1]
        nonfinite = nonfinite.view(rows, -1).any(dim=1)
        pool.extend(children.view(rows, -1), leaves.repeat_interleave(width, dim=1), candidates, nonfinite)
        if level + 1 == num_steps:
            break
        best = _best(candidates, width)
        leaves, scores = before + best, candidates.gather(1, best)
        tokens = children.view(rows, -1).gather(1, best)
        parents = best // width
        hidden = heads.hidden[(parents + torch.arange(rows, device=best.device).unsqueeze(1) * width).flatten()]
    return pool


def best_nodes(pool: Pool, max_nodes: torch.Tensor, max_depths: torch.Tensor, most: int) -> DraftsOnDevice:
    """Return each row's best nodes within its limits [rows], in pool order, padded to ``most``, without a read."""
    num_candidates = pool.tokens.shape[1]
    place = torch.arange(num_candidates, device=pool.tokens.device)
    allowed = (pool.scores > -torch.inf) & (pool.depths <= max_depths.unsqueeze(1))
    ranking = _best(pool.scores.masked_fill(~allowed, -torch.inf), num_candidates)
    rank = torch.empty_like(ranking).scatter_(1, ranking, place.expand_as(ranking))
    kept = allowed & (rank < max_nodes.unsqueeze(1))
    chosen = torch.where(kept, place, num_candidates).sort(dim=1).values[:, :most]
    is_node, chosen = chosen < num_candidates, chosen.clamp(max=num_candidates - 1)
    parents = pool.parents.gather(1, chosen)
    # A score never exceeds its parent's, and of equal scores the earlier is better: parents are kept.
    parents_kept = (kept.cumsum(dim=1) - 1).gather(1, parents.clamp(min=0)).where(parents >= 0, -1)
    branches = Branches(parents_kept.where(is_node, -1), pool.depths[chosen].where(is_node, 1), pool.nonfinite)
    return DraftsOnDevice(pool.tokens.gather(1, chosen).where(is_node, ENDED), branches)


def _children(logits: torch.Tensor, width: int, vocab: DraftVocab) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (log probabilities, target token ids) [rows, width] of the likeliest next tokens, and nonfinite [rows]."""
    log_p, draft_ids = logits.log_softmax(dim=-1).topk(width, dim=-1)
    return log_p.nan_to_num(nan=-torch.inf, neginf=-torch.inf), vocab.tokens(draft_ids), log_p[:, 0].isnan()


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the indices [rows, count] of the highest scores, best first; of equal scores the earlier."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


def tree_reference(
    distribution_after: Callable[[tuple[int, ...]], Sequence[float]], num_steps: int, topk: int, num_draft_tokens: int
) -> tuple[list[tuple[int, int, float]], Draft]:
    """Grow the same tree one node at a time with plain probabilities; tests compare ``grow_trees`` with it.

    ``distribution_after(path)`` are the next token's probabilities after the root and ``path``. Returns the pool as
    (token, parent, score), and the draft.
    """
    pool: list[tuple[int, int, float]] = []
    paths: list[tuple[int, ...]] = []

    def add_children(parent: int) -> None:
        path, score = ((), 1.0) if parent < 0 else (paths[parent], pool[parent][2])
        distribution = distribution_after(path)
        for token in sorted(range(len(distribution)), key=lambda token: -distribution[token])[:topk]:
            pool.append((token, parent, score * distribution[token]))
            paths.append((*path, token))

    add_children(-1)
    leaves = list(range(len(pool)))
    for _ in range(1, num_steps):
        before = len(pool)
        for leaf in leaves:
            add_children(leaf)
        leaves = sorted(range(before, len(pool)), key=lambda node: -pool[node][2])[:topk]
    kept = sorted(sorted(range(len(pool)), key=lambda node: -pool[node][2])[: num_draft_tokens - 1])
    place = {node: index for index, node in enumerate(kept)} | {-1: -1}
    return pool, Draft(tuple(pool[node][0] for node in kept), tuple(place[pool[node][1]] for node in kept))
