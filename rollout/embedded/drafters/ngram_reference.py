"""The reference of the n-gram trie keeps every n-gram that was inserted, in order; NgramDrafter must agree."""

from __future__ import annotations

from collections.abc import Sequence

Ngram = tuple[int, ...]


class ReferenceNgrams:
    """Finds what followed an n-gram by a search through all inserted n-grams; it has no bound."""

    def __init__(self, max_depth: int) -> None:
        self.max_depth = max_depth
        self._inserted: list[Ngram] = []
        self._num_seen: dict[int, tuple[int, int]] = {}  # request -> (first token inserted, tokens seen)

    def insert(self, request: int, token_ids: Sequence[int]) -> None:
        """Insert every n-gram that ends with a token which is new since the request's last call."""
        first, seen = self._num_seen.get(request, (max(0, len(token_ids) - self.max_depth),) * 2)
        for end in range(seen + 1, len(token_ids) + 1):
            for length in range(1, min(self.max_depth, end - first) + 1):
                self._inserted.append(tuple(token_ids[end - length : end]))
        self._num_seen[request] = (first, len(token_ids))

    def anchors(self, request: int, token_ids: Sequence[int]) -> list[tuple[Ngram, int]]:
        """Return (n-gram, length) of every suffix inserted that has a continuation, the longest first."""
        first, _ = self._num_seen[request]
        lengths = range(min(self.max_depth, len(token_ids) - first), 0, -1)
        suffixes = [(tuple(token_ids[len(token_ids) - length :]), length) for length in lengths]
        return [(ngram, length) for ngram, length in suffixes if self.latest(ngram, 1)]

    def latest(self, ngram: Ngram, limit: int) -> list[tuple[int, Ngram]]:
        newest_first = dict.fromkeys(each[-1] for each in reversed(self._inserted) if each[:-1] == ngram)
        return [(token_id, (*ngram, token_id)) for token_id in newest_first][:limit]

    def commonest(self, ngram: Ngram, limit: int) -> list[tuple[int, Ngram, int]]:
        counted = [(token_id, longer, self._inserted.count(longer)) for token_id, longer in self.latest(ngram, 10**9)]
        return sorted(counted, key=lambda each: -each[2])[:limit]
