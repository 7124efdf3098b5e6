"""A device pass describes one pass in buffers of the device that never move, so that a captured graph reads them anew.

    upload:  | tokens | positions | rows: row, start, count, tree start, prefix row, prefix length, store | lineage |

Everything the host knows of a pass goes up in one copy, which the host does not wait for. Rows have ``queries`` tokens
each; what is shorter is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from rollout.embedded.kv_cache import KvStore
from rollout.embedded.plan import RowSpan, positions_of, tree_shape
from rollout.embedded.transfer import uploaded
from rollout.embedded.unread import Placement

Words = npt.NDArray[np.int32]
WORD_BITS = 32


class Column(IntEnum):
    """Names the columns of a pass's rows, as the kernels read them."""

    ROW = 0
    START = 1
    COUNT = 2
    TREE_START = 3
    PREFIX_ROW = 4
    PREFIX_LEN = 5
    STORE = 6  # of the row: 0 for the own store, 1 for the prefixes'


NUM_COLUMNS = 8


@dataclass(frozen=True)
class Bucket:
    """Names the shape of a pass: its rows, the tokens of each, and the words of a token's lineage, 0 for chains."""

    rows: int
    queries: int
    words: int = 0

    @property
    def tokens(self) -> int:
        return self.rows * self.queries


class KvTable:
    """Tells the kernels where the stores of a cache lie; ``refresh`` after every change of a store's memory."""

    def __init__(self, own: KvStore, prefixes: KvStore, device: torch.device) -> None:
        self.stores = own, prefixes
        num_layers = len(own.keys)
        self.addresses = torch.zeros(num_layers, 2, 2, dtype=torch.int64, device=device)  # layer, store, keys or values
        self.strides = torch.zeros(2, 2, dtype=torch.int64, device=device)  # store, row or head, in elements
        self._seen: tuple[int, int] | None = None

    def refresh(self) -> None:
        """Write the stores' addresses, if one has moved since the last call."""
        stores = self.stores
        generations = stores[0].generation, stores[1].generation
        if generations == self._seen:
            return
        self._seen = generations
        addresses = [
            [(keys.data_ptr(), values.data_ptr()) for keys, values in zip(store.keys, store.values, strict=True)]
            for store in stores
        ]
        upload(torch.tensor(addresses).transpose(0, 1).contiguous(), self.addresses)
        upload(torch.tensor([store.keys[0].stride()[:2] for store in stores]), self.strides)


class DevicePass:
    """Holds the buffers of passes of one shape."""

    has_first_position = True  # it may; see AttentionPlan

    def __init__(self, bucket: Bucket, table: KvTable, device: torch.device) -> None:
        self.bucket, self.table = bucket, table
        sizes = bucket.tokens, bucket.tokens, bucket.rows * NUM_COLUMNS, bucket.tokens * bucket.words
        self._buffer = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        tokens, positions, rows, lineage = self._buffer.split(sizes)
        self.tokens, self.positions = tokens, positions
        self.rows, self.lineage = rows.view(bucket.rows, NUM_COLUMNS), lineage

    @property
    def counts(self) -> torch.Tensor:
        """Return how many tokens each row has [rows]."""
        return self.rows[:, Column.COUNT]

    def fill(
        self,
        spans: Sequence[RowSpan],
        token_ids: Sequence[int],
        prefixes: bool = False,
        unread: Placement | None = None,
    ) -> None:
        """Describe a pass; ``prefixes`` says that its rows are those of the prefix store.

        Drafts that are ``unread`` go where they belong without the host, over what ``spans`` and ``token_ids`` say.
        """
        self.table.refresh()
        upload(torch.from_numpy(packed(self.bucket, spans, token_ids, prefixes)), self._buffer)
        if unread is not None:
            self._place(unread)

    def _place(self, unread: Placement) -> None:
        drafts, most = unread.of, unread.num_tokens
        index = self._row_index(unread.rows)
        nodes = slice(1, 1 + most)
        self._by_row(self.tokens)[index, nodes] = drafts.tokens[:, :most].clamp(min=0).int()
        if drafts.branches is not None:
            parents, depths = drafts.branches.parents[:, :most], drafts.branches.depths[:, :most]
            self.place_trees(index, self.rows[index, Column.START], F.pad(depths, (1, 0)), sight(parents))

    def place_trees(
        self, rows: slice | torch.Tensor, tree_starts: torch.Tensor, depths: torch.Tensor, sees: torch.Tensor
    ) -> None:
        """Let tokens of some rows be nodes of trees that begin at slots ``tree_starts`` [rows].

        ``depths`` [rows, tokens] are 0 for what follows the slot before the tree; ``sees`` [rows, tokens, nodes] says
        which nodes each token sees.
        """
        count = depths.shape[1]
        self.rows[rows, Column.TREE_START] = tree_starts
        first = tree_starts + self.rows[rows, Column.PREFIX_LEN]
        self._by_row(self.positions)[rows, :count] = (first.unsqueeze(1) + depths).int()
        lineage = self.lineage.view(self.bucket.rows, self.bucket.queries, self.bucket.words)
        lineage[rows, :count] = words_on_device(sees, self.bucket.words)

    def _by_row(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.view(self.bucket.rows, self.bucket.queries)

    def _row_index(self, rows: Sequence[int]) -> slice | torch.Tensor:
        """Return an index of rows: a slice, which needs no upload, where they are the first."""
        if rows[-1] == len(rows) - 1:
            return slice(len(rows))
        return uploaded(self.tokens.device, np.array(rows, np.int64))[0]


def sight(parents: torch.Tensor) -> torch.Tensor:
    """Return which node of root and drafted tokens sees which [rows, 1 + drafted, 1 + drafted], without a read.

    ``parents`` [rows, drafted] are those of Draft: -1 is the root.
    """
    own = torch.eye(parents.shape[1] + 1, dtype=torch.bool, device=parents.device).expand(len(parents), -1, -1)
    above = F.pad(parents + 1, (1, 0)).unsqueeze(2).expand_as(own)
    sees = (own | own.gather(1, above)).float()
    for _ in range(parents.shape[1].bit_length()):  # each time twice as far up
        sees = (sees @ sees > 0).float()
    return sees.bool()


def words_on_device(sees: torch.Tensor, num_words: int) -> torch.Tensor:
    """Return ``lineage_words`` of [.., nodes] truths as int32 [.., words]."""
    bits = F.pad(sees, (0, num_words * WORD_BITS - sees.shape[-1])).unflatten(-1, (num_words, WORD_BITS))
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=sees.device)
    # The highest bit is the sign, as in ``lineage_words``.
    return (bits.int() << shifts).sum(dim=-1, dtype=torch.int32)


class Places:
    """Says which of a bucket's tokens are those of a pass, in order."""

    def __init__(self, bucket: Bucket, spans: Sequence[RowSpan], device: torch.device) -> None:
        self._bucket, self._count = bucket, sum(span.count for span in spans)
        self._index: torch.Tensor | None = None
        if self._count < len(spans) * bucket.queries:
            index = np.concatenate([row * bucket.queries + np.arange(span.count) for row, span in enumerate(spans)])
            self._index = torch.empty(len(index), dtype=torch.int64, device=device)
            upload(torch.from_numpy(index), self._index)

    def packed(self, padded: torch.Tensor) -> torch.Tensor:
        """Return a copy of the pass's tokens of [bucket's tokens, ..]."""
        return padded[: self._count].clone() if self._index is None else padded.index_select(0, self._index)

    def padded(self, packed: torch.Tensor) -> torch.Tensor:
        """Return the pass's tokens [tokens, ..] as [bucket's tokens, ..], with zeros between."""
        padded = packed.new_zeros(self._bucket.tokens, *packed.shape[1:])
        self.pad(packed, padded)
        return padded

    def pad(self, packed: torch.Tensor, padded: torch.Tensor) -> None:
        """Write the pass's tokens to their places among the bucket's."""
        if self._index is None:
            padded[: self._count] = packed
        else:
            padded.index_copy_(0, self._index, packed)


def packed(bucket: Bucket, spans: Sequence[RowSpan], token_ids: Sequence[int], prefixes: bool = False) -> Words:
    """Return what a pass's buffer holds, see the module's picture."""
    rows = np.zeros((bucket.rows, NUM_COLUMNS), np.int32)
    rows[: len(spans), : Column.STORE] = [
        (
            *(span.row, span.start, span.count, span.start if span.parents is None else span.tree_start),
            *(max(span.prefix_row, 0), span.prefix_len),
        )
        for span in spans
    ]
    rows[:, Column.STORE] = prefixes
    numbers = np.arange(bucket.queries, dtype=np.int32)
    own = numbers < rows[:, Column.COUNT, None]
    tokens = np.zeros(own.shape, np.int32)
    tokens[own] = token_ids
    positions = np.where(own, rows[:, Column.START, None] + rows[:, Column.PREFIX_LEN, None] + numbers, 0)
    lineage = np.zeros((bucket.rows, bucket.queries, bucket.words), np.int32)
    if bucket.words:
        lineage[:] = lineage_words(RowSpan(0, 0, bucket.queries), bucket.words)
    for index, span in enumerate(spans):
        if span.parents is not None:
            positions[index, : span.count] = positions_of(span)
            lineage[index, : span.count] = lineage_words(span, bucket.words)
    return np.concatenate([each.reshape(-1) for each in (tokens, positions, rows, lineage)])


def lineage_words(span: RowSpan, num_words: int) -> Words:
    """Return the bits [tokens, words] of the nodes that each token of a span sees, the tree's first node lowest."""
    parents = span.parents if span.parents is not None else tuple(range(-1, span.count - 1))
    sees = np.zeros((span.count, num_words * WORD_BITS), np.uint8)
    sees[:, : len(parents)] = tree_shape(parents)[0][-span.count :]
    return np.packbits(sees, axis=1, bitorder="little").view(np.int32)


def words_of(spans: Sequence[RowSpan]) -> int:
    """Return how many words a token's lineage needs: none where every span is a chain."""
    nodes = max((len(span.parents) for span in spans if span.parents is not None), default=0)
    if nodes == 0:
        return 0
    longest = max(nodes, max(span.count for span in spans))
    return -(-longest // WORD_BITS)


def words_of_unread(unread: Placement) -> int:
    """Return the same for a pass over drafts on the device."""
    return 0 if unread.of.branches is None else -(-(1 + unread.num_tokens) // WORD_BITS)


def exact_bucket(spans: Sequence[RowSpan], words: int = 0) -> Bucket:
    """Return the shape, of at least ``words``, of a pass that is not captured."""
    return Bucket(len(spans), max(span.count for span in spans), max(words, words_of(spans)))


def upload(host: torch.Tensor, device: torch.Tensor) -> None:
    """Copy to a device without waiting for it: pageable memory has been read when the call returns."""
    device.copy_(host, non_blocking=True)
