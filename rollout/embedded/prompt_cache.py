"""A prompt cache keeps the keys and values of recent texts, so that what prompts begin alike with is computed once.

    keep(tokens)      a prompt that has just been computed, or a prompt with its reply, which the next turn begins with;
                      in place of the text that it continues, or of the one that was of no use for longest
    longest(tokens)   the kept prompt that begins alike with these tokens over the greatest length, if that is enough
    copy(beginning)   its keys and values go into another prompt's row; its features for the drafter come with it

All prompts of a task share its chat template, many requests repeat a prompt, and a turn repeats all before it. What is
kept is of the weights that serve: it is cleared when they change. SGLang's radix cache does the same with pages that
are shared and not copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rollout.embedded.kv_cache import KvCache, KvStore

PART_OF_CACHE = 8  # one token in so many of the cache's may be a kept text's
LEAST_PROMPTS, MOST_PROMPTS = 4, 64  # texts for which that part is enough, and that are looked through
# Fewer tokens are computed about as fast as they are copied; on a GPU they are rows of a pass that is run anyway.
LEAST_TOKENS, LEAST_TOKENS_ON_GPU = 16, 256


@dataclass(frozen=True)
class Beginning:
    """Holds the first ``length`` tokens of a kept prompt; ``features`` are [length, width], None without a need."""

    row: int
    length: int
    features: torch.Tensor | None


@dataclass
class _Kept:
    token_ids: tuple[int, ...]
    features: torch.Tensor | None
    last_use: int


class PromptCache:
    """Keeps texts in ``cache.kept``, the fewer the longer they are, each as far as its row has room."""

    def __init__(self, cache: KvCache, is_on: bool = True) -> None:
        self._cache = cache
        self._prompts: list[_Kept] = []  # prompts[i] owns row i
        self._clock = 0
        self.least = LEAST_TOKENS_ON_GPU if cache.device.type == "cuda" else LEAST_TOKENS
        self._room = cache.max_total_tokens // PART_OF_CACHE if is_on else 0
        self._most = self._room // LEAST_PROMPTS

    @property
    def is_on(self) -> bool:
        """Return whether a prompt that is worth keeping has room."""
        return self._most >= self.least

    def clear(self) -> None:
        """Forget everything: the weights change."""
        self._prompts.clear()

    def longest(self, token_ids: Sequence[int]) -> Beginning | None:
        """Return the longest beginning of these tokens that is kept, None where none has ``least`` tokens."""
        self._note_lost_room()
        lengths = [num_common(kept.token_ids, token_ids) for kept in self._prompts]
        length = max(lengths, default=0)
        if length < self.least:
            return None
        row = lengths.index(length)
        kept = self._prompts[row]
        kept.last_use = self._tick()
        return Beginning(row, length, None if kept.features is None else kept.features[:length])

    def copy(self, beginning: Beginning, store: KvStore, row: int) -> None:
        """Copy the beginning's keys and values into a row of a store in use."""
        store.copy_from(self._cache.kept, beginning.row, row, beginning.length)

    def keep(self, token_ids: Sequence[int], store: KvStore, row: int, features: torch.Tensor | None) -> None:
        """Keep the tokens whose keys and values lie in ``row``, as far as there is room."""
        self._note_lost_room()
        count = min(len(token_ids), self._most)
        text = tuple(token_ids[:count])
        if count < self.least or any(kept.token_ids[:count] == text for kept in self._prompts):
            return
        target = self._row_for(text)
        capacity = max(count, self._cache.kept.capacity)
        num_rows = max(LEAST_PROMPTS, min(MOST_PROMPTS, self._room // capacity))
        if target >= num_rows:
            target = min(range(num_rows), key=lambda each: self._prompts[each].last_use)
        # Rows come by doubling, as a filling batch's do; longer texts leave room for fewer.
        grown = self._cache.kept.rows if target < self._cache.kept.rows else max(LEAST_PROMPTS, 2 * target)
        if not self._cache.reserve_kept((min(grown, num_rows), capacity)):
            return
        del self._prompts[num_rows:]
        self._prompts[target : target + 1] = [
            _Kept(text, None if features is None else features[:count].clone(), self._tick())
        ]
        self._cache.kept.copy_from(store, row, target, count)

    def _row_for(self, text: tuple[int, ...]) -> int:
        """Return the row of the kept text that this one continues, else the next row."""
        for row, kept in enumerate(self._prompts):
            if text[: len(kept.token_ids)] == kept.token_ids:
                return row
        return len(self._prompts)

    def _note_lost_room(self) -> None:
        if not self._cache.kept.rows:
            self.clear()

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def num_common(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many tokens both begin with: ``num_common((1, 2, 3), (1, 2, 4, 5)) == 2``."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
