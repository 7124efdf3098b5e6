"""A suffix array sorts the suffixes of a fixed corpus: the occurrences of an n-gram are one range of the array."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

SEPARATOR = 0  # between documents; tokens are stored one higher, so that it sorts first and matches nothing
SAMPLED = 256  # occurrences of an n-gram that are looked at; a more frequent one is sampled evenly
CACHED = 4096
Place = tuple[int, int, int]  # (first, past the last of the range, length of the n-gram)


class SuffixArray:
    """Finds n-grams of up to ``max_depth`` tokens in ``documents``, and the tokens that follow them."""

    def __init__(self, documents: Sequence[Sequence[int]], max_depth: int) -> None:
        separator = np.zeros(1, dtype=np.uint32)
        parts = [part for document in documents for part in (np.asarray(document, dtype=np.uint32) + 1, separator)]
        tokens = np.concatenate(parts)
        order = sorted_suffixes(tokens, max_depth)
        self._tokens, self._order, self._positions = tokens.data, order.data, order
        # Big endian, bytes compare as the numbers do: a slice of them is an n-gram that sorts in its place.
        self._bytes = _sortable(tokens)
        # The corpus never changes, and its frequent n-grams are asked for again and again.
        self._by_recency = lru_cache(CACHED)(self._sorted_by_recency)
        self._by_count = lru_cache(CACHED)(self._sorted_by_count)

    def anchors(self, tail: Sequence[int]) -> Iterator[tuple[Place, int]]:
        """Yield (place, length) of every suffix of ``tail`` that the corpus continues, the longest first.

        A suffix that occurs just where a longer one does is left out: it has nothing to add.
        """
        seen, ngram = 0, _sortable(np.array(tail, dtype=np.uint32) + 1)
        for length in range(self._longest(ngram), 0, -1):
            first, last = self._range(ngram[-4 * length :])
            if last - first > seen and (place := (first, last, length)) and self._by_count(place):
                yield place, length
            seen = last - first

    def latest(self, place: Place, limit: int) -> Sequence[tuple[int, Place]]:
        """Return continuations; the continuation whose last occurrence is latest in the corpus comes first."""
        return self._by_recency(place)[:limit]

    def commonest(self, place: Place, limit: int) -> Sequence[tuple[int, Place, int]]:
        return self._by_count(place)[:limit]

    def _sorted_by_recency(self, place: Place) -> tuple[tuple[int, Place], ...]:
        found = self._split(place)
        found.sort(key=lambda each: -int(self._positions[each[1][0] : each[1][1]].max()))
        return tuple(found)

    def _sorted_by_count(self, place: Place) -> tuple[tuple[int, Place, int], ...]:
        found = self._split(place)
        found.sort(key=lambda each: each[1][0] - each[1][1])
        return tuple((token_id, continued, continued[1] - continued[0]) for token_id, continued in found)

    def _longest(self, tail: bytes) -> int:
        """Return the length of the longest suffix of ``tail`` that occurs: if it does, so do all shorter ones."""

        def is_absent(length: int) -> bool:
            first, last = self._range(tail[-4 * length :])
            return first == last

        return bisect_left(range(1, len(tail) // 4 + 1), True, key=is_absent)

    def _range(self, wanted: bytes) -> tuple[int, int]:
        """Return the range of the order whose suffixes begin with ``wanted``."""
        num_bytes, data = len(wanted), self._bytes

        def at(position: int) -> bytes:
            return data[4 * position : 4 * position + num_bytes]

        first = bisect_left(self._order, wanted, key=at)
        return first, bisect_right(self._order, wanted, lo=first, key=at)

    def _split(self, place: Place) -> list[tuple[int, Place]]:
        """Return (token, place) of all continuations in order of their tokens; of a frequent n-gram, of a sample."""
        first, last, length = place
        tokens, order = self._tokens, self._order
        found: list[tuple[int, Place]] = []
        stride = -(-(last - first) // SAMPLED)
        index = first
        while index < last:
            token = tokens[order[index] + length]
            # Continuations sort by their token, so that each is one stretch of the range.
            end = bisect_right(order, token, lo=index, hi=last, key=lambda position: tokens[position + length])
            if token != SEPARATOR:
                found.append((token - 1, (index, end, length + 1)))
            index = max(end, index + stride)
        return found


def _sortable(tokens: npt.NDArray[np.uint32]) -> bytes:
    return tokens.astype(">u4").tobytes()


def sorted_suffixes(tokens: npt.NDArray[np.uint32], max_depth: int) -> npt.NDArray[np.int32]:
    """Return the positions of ``tokens`` in the order of what stands there, its first ``max_depth`` tokens at least.

    Ranks of n-grams are doubled in length until they reach ``max_depth`` (Manber and Myers); equals stay in the order
    of their positions.
    """
    rank = np.unique(tokens, return_inverse=True)[1].astype(np.int64)
    length = 1
    while length < max_depth and len(tokens) > length:
        beyond = np.zeros_like(rank)
        beyond[:-length] = rank[length:] + 1
        rank = np.unique(rank * (int(rank.max()) + 2) + beyond, return_inverse=True)[1].astype(np.int64)
        length *= 2
    return np.argsort(rank, kind="stable").astype(np.int32)
