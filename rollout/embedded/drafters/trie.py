"""A trie stores recent n-grams: what followed them, how often, and which continuation came last.

A node is an index into flat arrays (about 30 bytes; no Python object per node, which a garbage collector would have to
walk). The children of a node are a linked list, the latest one first; a node of many children also has a dict of them.

Every token of a sequence is inserted once, at the end of each of its n-grams: the caller keeps the nodes of the latest
suffixes (``Suffixes``), and a token moves each of them one level down. These nodes are also where drafting starts.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

ROOT, NO_NODE, FREE = 0, -1, -2
WIDE = 8  # children beyond which a node is given a dict
EVICTED_SHARE = 64  # an eviction frees this part of the capacity, because finding the oldest looks at all nodes


@dataclass(eq=False)
class Suffixes:
    """Holds the nodes of a sequence's suffixes: ``nodes[d]`` for its last d tokens, NO_NODE where the node is gone."""

    nodes: list[int] = field(default_factory=lambda: [ROOT])
    num_seen: int = 0  # tokens of the sequence that were inserted
    epoch: int = 0


class Trie:
    """Stores n-grams of up to ``max_depth`` tokens in up to ``capacity`` nodes; the least recently seen leave first."""

    def __init__(self, max_depth: int, capacity: int) -> None:
        assert capacity >= max_depth, "the configuration's check refuses a trie that cannot hold one n-gram"
        self.max_depth, self.capacity = max_depth, capacity
        self.num_nodes = 0
        self.epoch = 0  # counts evictions, each of which may free the nodes that suffixes remember
        self._now = 0
        self._token, self._parent, self._count = array("i", [0]), array("i", [FREE]), array("i", [0])
        self._newest, self._older, self._newer = array("i", [NO_NODE]), array("i", [NO_NODE]), array("i", [NO_NODE])
        self._seen_at = array("q", [0])
        self._free: list[int] = []
        self._wide: dict[int, dict[int, int]] = {}

    def insert(self, suffixes: Suffixes, token_ids: Sequence[int]) -> None:
        """Append what ``token_ids``, the whole sequence, has beyond ``suffixes.num_seen``.

        Of a sequence that is seen first, only the last ``max_depth`` tokens are inserted.
        """
        start = suffixes.num_seen or max(0, len(token_ids) - self.max_depth)
        for end in range(start, len(token_ids)):
            if self.num_nodes + self.max_depth > self.capacity:
                self._evict(max(self.max_depth, self.capacity // EVICTED_SHARE))
            if suffixes.epoch != self.epoch:
                self._recover(suffixes, token_ids[max(0, end - self.max_depth) : end])
            suffixes.nodes = self._advance(suffixes.nodes, token_ids[end])
        suffixes.num_seen = len(token_ids)

    def anchors(self, suffixes: Suffixes, token_ids: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield (node, length) of every suffix of the sequence that was continued before, the longest first."""
        if suffixes.epoch != self.epoch:
            self._recover(suffixes, token_ids[-self.max_depth :])
        newest, nodes = self._newest, suffixes.nodes
        for length in range(len(nodes) - 1, 0, -1):
            node = nodes[length]
            if node >= 0 and newest[node] >= 0:
                yield node, length

    def latest(self, node: int, limit: int) -> list[tuple[int, int]]:
        """Return (token, node) of at most ``limit`` continuations, the most recent first."""
        token, older = self._token, self._older
        found = []
        child = self._newest[node]
        while child >= 0 and limit > 0:
            found.append((token[child], child))
            child = older[child]
            limit -= 1
        return found

    def commonest(self, node: int, limit: int) -> list[tuple[int, int, int]]:
        """Return (token, node, count) of at most ``limit`` continuations, most frequent first, of equals the latest."""
        token, older, count = self._token, self._older, self._count
        found = []
        child = self._newest[node]
        while child >= 0:
            found.append((token[child], child, count[child]))
            child = older[child]
        found.sort(key=_minus_count)
        return found[:limit]

    def _advance(self, nodes: list[int], token_id: int) -> list[int]:
        """Return the suffixes' nodes one token later.

        Each n-gram that ends with it is counted, and made where it is new.
        """
        self._now = now = self._now + 1
        newest, token, older, wide = self._newest, self._token, self._older, self._wide
        count, seen_at = self._count, self._seen_at
        moved = [ROOT]
        for node in nodes[: self.max_depth]:
            if node < 0:
                moved.append(NO_NODE)
                continue
            child = first = newest[node]
            if node in wide:
                child = wide[node].get(token_id, NO_NODE)
            else:
                while child >= 0 and token[child] != token_id:
                    child = older[child]
            if child < 0:
                child = self._add(node, token_id)
            elif child != first:
                self._bring_forward(node, child)
            count[child] += 1
            seen_at[child] = now
            moved.append(child)
        return moved

    def _add(self, parent: int, token_id: int) -> int:
        first = self._newest[parent]
        if self._free:
            node = self._free.pop()
            self._token[node], self._parent[node], self._count[node] = token_id, parent, 0
            self._newest[node], self._older[node], self._newer[node] = NO_NODE, first, NO_NODE
        else:
            node = len(self._token)
            self._token.append(token_id)
            self._parent.append(parent)
            self._count.append(0)
            self._newest.append(NO_NODE)
            self._older.append(first)
            self._newer.append(NO_NODE)
            self._seen_at.append(0)
        if first >= 0:
            self._newer[first] = node
        self._newest[parent] = node
        self.num_nodes += 1
        if parent in self._wide:
            self._wide[parent][token_id] = node
        elif first >= 0 and len(children := self.latest(parent, WIDE + 1)) > WIDE:
            self._wide[parent] = dict(children)
        return node

    def _bring_forward(self, parent: int, child: int) -> None:
        """Make ``child``, which has a newer sibling, its parent's newest."""
        self._unlink(parent, child)
        first = self._newest[parent]
        self._older[child], self._newer[child] = first, NO_NODE
        self._newer[first] = child
        self._newest[parent] = child

    def _unlink(self, parent: int, child: int) -> None:
        older, newer = self._older[child], self._newer[child]
        if newer >= 0:
            self._older[newer] = older
        else:
            self._newest[parent] = older
        if older >= 0:
            self._newer[older] = newer

    def _evict(self, count: int) -> None:
        """Free the ``count`` nodes seen longest ago; a node with children outlives them."""
        wanted = self.num_nodes - min(count, self.num_nodes)
        while self.num_nodes > wanted:
            for node in self._oldest_leaves(self.num_nodes - wanted):
                parent = self._parent[node]
                self._unlink(parent, node)
                if parent in self._wide:
                    del self._wide[parent][self._token[node]]
                self._wide.pop(node, None)
                self._parent[node] = FREE
                self._free.append(node)
                self.num_nodes -= 1
        self.epoch += 1

    def _oldest_leaves(self, count: int) -> list[int]:
        leaves = np.flatnonzero((np.frombuffer(self._newest, "i4") < 0) & (np.frombuffer(self._parent, "i4") >= 0))
        seen_at = np.frombuffer(self._seen_at, "i8")[leaves]
        if count < len(leaves):
            chosen = np.argpartition(seen_at, count)[:count]
            leaves = leaves[chosen]
        return [int(node) for node in leaves]

    def _recover(self, suffixes: Suffixes, tail: Sequence[int]) -> None:
        """Find the suffixes' nodes anew after an eviction; ``tail`` are the latest tokens that were inserted."""
        nodes = [ROOT]
        for length in range(1, len(tail) + 1):
            node = ROOT
            for token_id in tail[len(tail) - length :]:
                node = self._child(node, token_id)
                if node < 0:
                    break
            nodes.append(node)
        suffixes.nodes, suffixes.epoch = nodes, self.epoch

    def _child(self, node: int, token_id: int) -> int:
        if node in self._wide:
            return self._wide[node].get(token_id, NO_NODE)
        child = self._newest[node]
        while child >= 0 and self._token[child] != token_id:
            child = self._older[child]
        return child


def _minus_count(child: tuple[int, int, int]) -> int:
    return -child[2]
