"""A plan describes one forward pass: the KV rows it covers, the tree that each row's tokens form, and the masks.

Tokens of a pass are packed ([tokens], rows one after another, each row with its own number of tokens), because the
linear layers cost per token. Attention needs a rectangle, so a plan says how to pad and unpack; the query heads that
share a KV head become extra query rows.

    row of the own store:   | committed …………… | root | node 0 | node 1 | node 2 |     slots
    parents (-1, 0, 1, 1)                        0  ◄─ 0  ◄──── 1
                                                       ▲──────────────── 2             slot != position below a fork

A token sees its prefix, the slots before its row's tree, its ancestors and itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
import torch

from rollout.embedded.kv_cache import KvStore

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(slots=True)  # not frozen: a round makes several a row, and that would take ten times as long
class RowSpan:
    """Describes the tokens of one row in a pass: ``count`` tokens in slots ``start ..``, after ``prefix_len`` others.

    Without ``parents`` they are a chain. Otherwise ``parents`` is the tree of the row's last ``len(parents)`` slots,
    parents before children: ``parents[i]`` is an index into it, -1 where a node follows the slot before the tree. It
    may be longer than ``count``: its first nodes then come from earlier passes (a tree that grows level by level).
    """

    row: int
    start: int
    count: int
    prefix_row: int = -1
    prefix_len: int = 0
    parents: tuple[int, ...] | None = None

    @property
    def end(self) -> int:
        """Return the number of slots in use after the pass."""
        return self.start + self.count

    @property
    def tree_start(self) -> int:
        """Return the slot of the tree's first node; everything before it is seen by all."""
        return self.end - len(self.parents) if self.parents is not None else self.end


@dataclass(frozen=True)
class PrefixPlan:
    """Says which shared prefix each row reads; a slot is (prefix, member), padded to the largest group."""

    store: KvStore
    num_prefixes: int
    num_members: int
    length: int
    row_of_slot: torch.Tensor  # [prefixes * members]
    slot_of_row: torch.Tensor  # [rows]
    hidden: torch.Tensor  # [rows, 1, 1, length], whether the row does not see the position


@dataclass(frozen=True)
class AttentionPlan:
    """Says where a pass's tokens go and which slots they see; index tensors and masks are made when first asked for.

    ``spans`` are of different rows of ``store``; ``prefixes`` is given where some row reads a shared prompt.
    """

    store: KvStore
    spans: tuple[RowSpan, ...]
    heads_per_kv: int
    dtype: torch.dtype
    device: torch.device
    prefixes: KvStore | None = None

    @cached_property
    def live(self) -> slice | torch.Tensor:
        """Return an index of the pass's rows: a slice, which copies nothing, where they follow each other."""
        rows = [span.row for span in self.spans]
        consecutive = rows == list(range(rows[0], rows[0] + len(rows)))
        return slice(rows[0], rows[0] + len(rows)) if consecutive else self._tensor(np.array(rows))

    @property
    def num_rows(self) -> int:
        return len(self.spans)

    @cached_property
    def num_queries(self) -> int:
        """Return the largest number of tokens that a row has; the other rows are padded to it."""
        return max(span.count for span in self.spans)

    @property
    def has_first_position(self) -> bool:
        """Return whether a token of the pass is the first of its sequence."""
        return any(span.prefix_len + span.start == 0 for span in self.spans)

    @cached_property
    def length(self) -> int:
        """Return the number of slots of the own store that attention reads."""
        return max(span.end for span in self.spans)

    @cached_property
    def positions(self) -> torch.Tensor:
        """Return absolute positions [tokens]."""
        return self._tensor(np.concatenate([positions_of(span) for span in self.spans]))

    @cached_property
    def write_index(self) -> torch.Tensor:
        """Return the index by which ``KvStore.write`` places each token's keys and values."""
        return self.store.write_index(*self.places)

    @cached_property
    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each token's row and slot, both [tokens]."""
        rows = np.repeat(np.array([span.row for span in self.spans]), self._counts)
        slots = np.concatenate([np.arange(span.start, span.end) for span in self.spans])
        return self._tensor(rows), self._tensor(slots)

    @cached_property
    def mask(self) -> torch.Tensor | None:
        """Return [rows, 1, queries * heads_per_kv or 1, length], 0 or -inf; None where every token sees every slot."""
        hidden = self._hidden()
        if not hidden.any():
            return None
        if self.num_queries > 1:
            hidden = hidden.repeat(self.heads_per_kv, axis=1)
        return self._mask(hidden).unsqueeze(1)

    @cached_property
    def pad_index(self) -> torch.Tensor | None:
        """Return [rows * queries] -> token; padding repeats a row's last token. None where nothing is padded."""
        if self._counts.min() == self.num_queries:
            return None
        first_token = self._counts.cumsum() - self._counts
        offsets = np.minimum(np.arange(self.num_queries), self._counts[:, None] - 1)
        return self._tensor((first_token[:, None] + offsets).reshape(-1))

    @cached_property
    def pack_index(self) -> torch.Tensor | None:
        """Return [tokens] -> rows * queries, the way back."""
        if self._counts.min() == self.num_queries:
            return None
        return self._tensor((np.arange(self.num_queries) < self._counts[:, None]).reshape(-1).nonzero()[0])

    @cached_property
    def prefix(self) -> PrefixPlan | None:
        return None if self.prefixes is None else self._prefix_plan(self.prefixes)

    @cached_property
    def _counts(self) -> Ints:
        return np.array([span.count for span in self.spans])

    def _hidden(self) -> Bools:
        """Return which slots each padded query does not see [rows, queries, length]."""
        starts = np.array([span.start for span in self.spans])
        last_seen = starts[:, None] + np.minimum(np.arange(self.num_queries), self._counts[:, None] - 1)
        hidden: Bools = np.arange(self.length) > last_seen[:, :, None]
        for index, span in enumerate(self.spans):
            if span.parents is not None:
                lineage, _ = tree_shape(span.parents)
                hidden[index, : span.count, span.tree_start : span.end] = ~lineage[-span.count :]
        return hidden

    def _prefix_plan(self, store: KvStore) -> PrefixPlan | None:
        members: dict[int, list[int]] = {}
        for index, span in enumerate(self.spans):
            if span.prefix_row >= 0:
                members.setdefault(span.prefix_row, []).append(index)
        if not members:
            return None
        # A row without a prefix sits in some prefix's slots too; it sees no position there.
        members[min(members)].extend(index for index, span in enumerate(self.spans) if span.prefix_row < 0)
        num_prefixes = max(members) + 1
        num_members = max(map(len, members.values()))
        row_of_slot = np.zeros(num_prefixes * num_members, dtype=np.int64)
        slot_of_row = np.zeros(self.num_rows, dtype=np.int64)
        for prefix_row, rows in members.items():
            slots = prefix_row * num_members + np.arange(len(rows))
            row_of_slot[slots], slot_of_row[rows] = rows, slots
        lens = np.array([span.prefix_len for span in self.spans])
        return PrefixPlan(
            store=store,
            num_prefixes=num_prefixes,
            num_members=num_members,
            length=int(lens.max()),
            row_of_slot=self._tensor(row_of_slot),
            slot_of_row=self._tensor(slot_of_row),
            hidden=torch.from_numpy(np.arange(lens.max()) >= lens[:, None]).to(self.device)[:, None, None],
        )

    def _tensor(self, array: Ints) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def _mask(self, hidden: Bools) -> torch.Tensor:
        mask = torch.zeros(hidden.shape, dtype=self.dtype)
        return mask.masked_fill_(torch.from_numpy(hidden), float("-inf")).to(self.device)


def make_plan(
    store: KvStore,
    spans: Sequence[RowSpan],
    heads_per_kv: int,
    dtype: torch.dtype,
    device: torch.device,
    prefixes: KvStore | None = None,
) -> AttentionPlan:
    """Plan one pass over rows of ``store``."""
    return AttentionPlan(store, tuple(spans), heads_per_kv, dtype, device, prefixes)


def positions_of(span: RowSpan) -> Ints:
    """Return absolute positions of the span's tokens: a node's is its depth beyond the tokens before the tree."""
    if span.parents is None:
        return np.arange(span.prefix_len + span.start, span.prefix_len + span.end)
    _, depths = tree_shape(span.parents)
    return span.prefix_len + span.tree_start + depths[-span.count :]


@lru_cache(maxsize=1024)
def tree_shape(parents: tuple[int, ...]) -> tuple[Bools, Ints]:
    """Return which node sees which [nodes, nodes] (its ancestors and itself), and every node's depth, the root's 0."""
    lineage = np.eye(len(parents), dtype=np.bool_)
    for node, parent in enumerate(parents):
        if parent >= 0:
            lineage[node] |= lineage[parent]
    return lineage, lineage.sum(axis=1) - 1


def sees(span: RowSpan, token: int, slot: int) -> bool:
    """Return whether the span's ``token``-th token attends to a slot of its row, by walking up parent by parent.

    For tests to hold ``AttentionPlan.mask`` against.
    """
    if span.parents is None:
        return slot <= span.start + token
    if slot < span.tree_start:
        return True
    node = span.start + token - span.tree_start
    while node >= 0:
        if span.tree_start + node == slot:
            return True
        node = span.parents[node]
    return False
