"""The running sequences and the rows of KV they own: sequences[i] owns row i of the own store, always."""

from __future__ import annotations

from rollout.embedded.attention import RowSpan
from rollout.embedded.kv_cache import KvCache
from rollout.embedded.request import Group, SampleState


class Batch:
    """Rows stay dense: what finishes is replaced by the last row, so attention reads slices."""

    def __init__(self, cache: KvCache, max_running: int) -> None:
        self._cache, self._max_running = cache, max_running
        self.sequences: list[SampleState] = []
        self.groups: list[Group] = []  # groups[i] owns row i of the prefix store

    def room_for(self, group: Group) -> int:
        """How many of the group's waiting samples can start now."""
        running = len(self.sequences)
        (_, capacity), (prefix_rows, prefix_capacity) = self._shapes(group, 1)
        rows = (self._cache.max_total_tokens - prefix_rows * prefix_capacity) // capacity
        return max(0, min(len(group.waiting), self._max_running - running, rows - running))

    def reserve(self, group: Group, num_samples: int) -> None:
        """Give the group's prompt its row and make room for its next samples; ``room_for`` has said they fit."""
        self._cache.reserve(*self._shapes(group, num_samples))
        if group.shares_prompt and group.prefix_row < 0:
            group.prefix_row = len(self.groups)
            self.groups.append(group)

    def add(self, sequence: SampleState) -> int:
        """Start a sequence in the next row and return the row."""
        sequence.group.num_running += 1
        self.sequences.append(sequence)
        return len(self.sequences) - 1

    def remove(self, row: int) -> None:
        """Free a row (the last one moves into it), and its group's prompt when no sample needs it any more."""
        group = self.sequences[row].group
        last = self.sequences.pop()
        if row < len(self.sequences):
            self._cache.own.move_row(len(self.sequences), row, last.own_len)
            self.sequences[row] = last
        group.num_running -= 1
        self.release_prefix(group)

    def release_prefix(self, group: Group) -> None:
        """Free the prompt's row if the group is through."""
        if group.prefix_row < 0 or group.num_running or group.waiting:
            return
        last = self.groups.pop()
        if last is not group:
            self._cache.prefixes.move_row(len(self.groups), group.prefix_row, last.num_prompt_tokens)
            self.groups[group.prefix_row] = last
            last.prefix_row = group.prefix_row
        group.prefix_row = -1

    def span(self, row: int, num_tokens: int) -> RowSpan:
        """A decode or verify pass over ``num_tokens`` tokens of a row."""
        sequence = self.sequences[row]
        group = sequence.group
        return RowSpan(row, sequence.own_len, num_tokens, group.prefix_row, group.prefix_tokens)

    @property
    def kv_tokens_used(self) -> int:
        """Positions that hold live keys and values, a shared prompt counted once."""
        return sum(s.own_len for s in self.sequences) + sum(g.num_prompt_tokens for g in self.groups)

    def _shapes(self, group: Group, num_samples: int) -> tuple[tuple[int, int], tuple[int, int]]:
        own_capacity = max((each.group.own_tokens for each in self.sequences), default=0)
        prefixes = [each.num_prompt_tokens for each in self.groups]
        if group.shares_prompt and group.prefix_row < 0:
            prefixes.append(group.num_prompt_tokens)
        own = len(self.sequences) + num_samples, max(own_capacity, group.own_tokens)
        return own, (len(prefixes), max(prefixes, default=0))
