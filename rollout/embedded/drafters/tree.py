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

import torch

from rollout.embedded.drafters.step import DraftStep, DraftVocab, Heads
from rollout.embedded.drafting import Draft, DraftContext
from rollout.embedded.plan import RowSpan
from rollout.embedded.transfer import downloaded


@dataclass
class Pool:
    """Holds all candidates so far, per row [rows, nodes]: its token, its parent (-1: the root), log score and depth."""

    tokens: torch.Tensor
    parents: torch.Tensor
    scores: torch.Tensor
    depths: list[int]
    nonfinite: torch.Tensor  # [rows], whether logits of a row's leaf were not finite numbers

    def extend(
        self, tokens: torch.Tensor, parents: torch.Tensor, scores: torch.Tensor, nonfinite: torch.Tensor
    ) -> None:
        self.nonfinite |= nonfinite
        self.depths += [self.depths[-1] + 1] * tokens.shape[1]
        self.tokens = torch.cat([self.tokens, tokens], dim=1)
        self.parents = torch.cat([self.parents, parents], dim=1)
        self.scores = torch.cat([self.scores, scores], dim=1)


def grow_trees(
    first: Heads,
    step: DraftStep,
    next_slots: Sequence[RowSpan],
    contexts: Sequence[DraftContext],
    num_steps: int,
    topk: int,
    num_draft_tokens: int,
    vocab: DraftVocab,
) -> list[Draft]:
    """Return a tree per row, of ``num_draft_tokens`` - 1 nodes or as many as its context allows.

    ``first`` follows each row's root; ``next_slots[row]`` is where the first leaf's keys go, the others after it.
    """
    rows, width = first.logits.shape[0], min(topk, first.logits.shape[1])
    num_steps = min(num_steps, max(context.max_depth for context in contexts))
    scores, tokens, nonfinite = _children(first.logits, width, vocab)
    pool = Pool(tokens, torch.full_like(tokens, -1), scores, [1] * width, nonfinite)
    leaves = torch.arange(width, device=scores.device).expand(rows, -1)  # in the pool
    hidden = first.hidden.repeat_interleave(width, dim=0)
    lineages: list[tuple[int, ...]] = [(-1,) * width] * rows  # parents within the draft's cache
    for level in range(1, num_steps):
        spans = [
            replace(slot, start=slot.start + (level - 1) * width, count=width, parents=lineage)
            for slot, lineage in zip(next_slots, lineages, strict=True)
        ]
        heads = step(tokens.flatten(), hidden, spans)
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
        parent = best // width  # among this level's leaves
        hidden = heads.hidden[(parent + torch.arange(rows, device=best.device).unsqueeze(1) * width).flatten()]
        first_of_level = (level - 1) * width
        lineages = [
            (*lineage, *(first_of_level + index for index in parents))
            for lineage, parents in zip(lineages, parent.tolist(), strict=True)
        ]
    return _select(pool, contexts, num_draft_tokens - 1)


def _children(logits: torch.Tensor, width: int, vocab: DraftVocab) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (log probabilities, target token ids) [rows, width] of the likeliest next tokens, and nonfinite [rows]."""
    log_p, draft_ids = logits.log_softmax(dim=-1).topk(width, dim=-1)
    return log_p.nan_to_num(nan=-torch.inf, neginf=-torch.inf), vocab.tokens(draft_ids), log_p[:, 0].isnan()


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the indices [rows, count] of the highest scores, best first; of equal scores the earlier."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


def _select(pool: Pool, contexts: Sequence[DraftContext], most: int) -> list[Draft]:
    """Return each row's best nodes within its context's bounds, in pool order."""
    ranking = pool.scores.sort(dim=1, descending=True, stable=True).indices
    num_possible = (pool.scores > -torch.inf).sum(dim=1)
    read = downloaded(ranking, num_possible, pool.tokens, pool.parents, pool.nonfinite)
    drafts = []
    for context, ranked, possible, tokens, parents, nonfinite in zip(
        contexts, *(array.tolist() for array in read), strict=True
    ):
        shallow = [node for node in ranked[:possible] if pool.depths[node] <= context.max_depth]
        kept = sorted(shallow[: min(most, context.max_draft_tokens)])
        place = {node: index for index, node in enumerate(kept)} | {-1: -1}
        parents_kept = tuple(place[parents[node]] for node in kept)
        drafts.append(Draft(tuple(tokens[node] for node in kept), parents_kept, nonfinite=bool(nonfinite)))
    return drafts


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
