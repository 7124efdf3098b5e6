"""Drafts grow here: chains or trees of a draft network, and trees of the tokens that followed an n-gram before.

A network grows a chain or a tree as the settings say. N-grams grow a tree in one of SGLang's two ways, from anchors: an
anchor is a suffix of the sequence that was seen before, and its length. Anchors come longest first, each grows the tree
from its root on, and what two of them propose is one node: siblings are distinct, and the tree holds only tokens that
were really seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Protocol, TypeVar

from rollout.embedded.draft import NO_DRAFT, Draft
from rollout.embedded.drafters.chain import grow_chains
from rollout.embedded.drafters.step import DrafterSetup, DraftRows, DraftStep, DraftVocab, Heads
from rollout.embedded.drafters.tree import grow_trees
from rollout.embedded.drafting import DraftContext
from rollout.embedded.plan import RowSpan
from rollout.embedded.unread import UnreadDraft

if TYPE_CHECKING:
    from rollout.embedded.cuda.graphed_drafts import GraphedDrafts

TREE_ROOT = -1
TOKEN_BITS = 32
Place = TypeVar("Place")


def grow_drafts(
    setup: DrafterSetup,
    vocab: DraftVocab,
    first: Heads,
    step: DraftStep,
    next_slots: Sequence[RowSpan],
    contexts: Sequence[DraftContext],
) -> list[UnreadDraft]:
    """Return a draft per context; see grow_chains and grow_trees."""
    shape = setup.shape
    if shape.topk == 1:
        return grow_chains(first, step, next_slots, contexts, shape.num_steps, vocab, setup.drawing)
    return grow_trees(first, step, next_slots, contexts, shape.num_steps, shape.topk, shape.num_draft_tokens, vocab)


def graphed_drafts(rows: DraftRows, setup: DrafterSetup) -> GraphedDrafts | None:
    """Return what grows drafts as captured graphs, None where passes are not captured."""
    if setup.graphs is None or rows.table is None:
        return None
    from rollout.embedded.cuda.graphed_drafts import GraphedDrafts  # needs Triton, which a CPU does without

    return GraphedDrafts(rows.table, setup.graphs, setup)


class Continuations(Protocol[Place]):
    """Knows what followed an n-gram; a place is an n-gram in it."""

    def latest(self, place: Place, limit: int, /) -> Sequence[tuple[int, Place]]:
        """Return (token, place) of at most ``limit`` continuations, the most recent first."""

    def commonest(self, place: Place, limit: int, /) -> Sequence[tuple[int, Place, int]]:
        """Return (token, place, count) of at most ``limit`` continuations, the most frequent first."""


@dataclass(eq=False)
class DraftTree:
    """Collects the nodes of a draft: at most ``max_nodes`` nodes on paths of at most ``max_depth``."""

    max_nodes: int
    max_depth: int
    token_ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    _index: dict[int, int] = field(default_factory=dict)

    def node(self, parent: int, token_id: int) -> int:
        """Return the node of ``token_id`` under ``parent``, added unless it is there."""
        key = (parent + 1) << TOKEN_BITS | token_id
        index = self._index.get(key)
        if index is None:
            index = self._index[key] = len(self.token_ids)
            self.token_ids.append(token_id)
            self.parents.append(parent)
            self.depths.append(self.depths[parent] + 1 if parent >= 0 else 1)
        return index

    def draft(self) -> Draft:
        return Draft(tuple(self.token_ids), tuple(self.parents)) if self.token_ids else NO_DRAFT


@dataclass(frozen=True)
class Growth:
    """Grows trees from n-grams; ``max_match`` is the longest anchor (one less than the longest n-gram)."""

    match_type: str
    min_breadth: int
    max_breadth: int
    max_match: int

    def grow(
        self,
        tree: DraftTree,
        source: Continuations[Place],
        anchors: Iterable[tuple[Place, int]],
        max_nodes: int,
    ) -> None:
        """Grow ``tree`` to at most ``max_nodes`` nodes from ``anchors``, (place, length) with the longest first."""
        if self.match_type == "BFS":
            self._by_recency(tree, source, anchors, max_nodes)
        else:
            self._by_frequency(tree, source, anchors, max_nodes)

    def _by_recency(
        self, tree: DraftTree, source: Continuations[Place], anchors: Iterable[tuple[Place, int]], max_nodes: int
    ) -> None:
        """Grow by level, latest continuations first: the fewer, the longer the anchor and the deeper the level."""
        taper = (self.max_breadth - self.min_breadth) / self.max_match
        token_ids, depths, max_depth = tree.token_ids, tree.depths, tree.max_depth
        for anchor, length in anchors:
            queue = [(TREE_ROOT, anchor, (self.max_match - length) * taper + self.min_breadth)]
            for parent, place, breadth in queue:
                if len(token_ids) >= max_nodes:
                    return
                if parent >= 0 and depths[parent] >= max_depth:
                    continue
                for token_id, continued in source.latest(place, max(1, int(breadth))):
                    if len(token_ids) >= max_nodes:
                        return
                    queue.append((tree.node(parent, token_id), continued, breadth - taper))

    def _by_frequency(
        self, tree: DraftTree, source: Continuations[Place], anchors: Iterable[tuple[Place, int]], max_nodes: int
    ) -> None:
        """Grow best first, by the product of relative frequencies along the path from the anchor."""
        heap: list[tuple[float, int, int, Place, int]] = []
        num_pushed = 0

        def push(parent: int, place: Place, probability: float) -> int:
            found = source.commonest(place, self.max_breadth)
            total = sum(count for _, _, count in found)
            for number, (token_id, continued, count) in enumerate(found, num_pushed):
                # The number orders equals by age, and keeps the heap from comparing places.
                heappush(heap, (-probability * count / total, number, parent, continued, token_id))
            return num_pushed + len(found)

        for anchor, _ in anchors:
            num_pushed = push(TREE_ROOT, anchor, 1.0)
            while heap and len(tree.token_ids) < max_nodes:
                minus_probability, _, parent, place, token_id = heappop(heap)
                node = tree.node(parent, token_id)
                if tree.depths[node] < tree.max_depth:
                    num_pushed = push(node, place, -minus_probability)
            if len(tree.token_ids) >= max_nodes:
                return
