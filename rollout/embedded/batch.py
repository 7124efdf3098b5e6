"""The batch holds the sequences that have KV and assigns KV rows: sequences[i] always owns row i of the own store.

    own store:      | running, in no order … | being prefilled, oldest first … | spare rows
    prefix store:   | prompts shared by a group …                              | spare rows

Rows stay dense, so that attention reads slices; of the sequences being prefilled only the first has KV in its row.
What a sequence or a prompt leaves is cleared: NaN or infinity in it would reach the next one, even with weight 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rollout.embedded.draft import Draft
from rollout.embedded.drafting import KvRow
from rollout.embedded.kv_cache import KvCache, Shape
from rollout.embedded.plan import RowSpan
from rollout.embedded.request import Group, SampleState
from rollout.embedded.unread import AnyDraft
from slime_spec.routed_experts import RoutedExperts

# A sequence is let in only if all could grow this much: otherwise it might be preempted in the very next round.
ADMISSION_SLACK_TOKENS = 32


class Batch:
    """Gives sequences and shared prompts their rows, within the bound of the cache."""

    def __init__(self, cache: KvCache, max_running: int, headroom: int, draft_cache: KvCache | None) -> None:
        """Keep ``headroom`` slots of every own row for drafts, and ``draft_cache`` in step with ``cache``."""
        self._cache, self._max_running, self._headroom = cache, max_running, headroom
        self._caches = [cache] if draft_cache is None else [cache, draft_cache]
        self.sequences: list[SampleState] = []
        self.num_running = 0
        self.groups: list[Group] = []  # groups[i] owns row i of the prefix store

    @property
    def running(self) -> list[SampleState]:
        return self.sequences[: self.num_running]

    def num_fitting(self, waiting: Sequence[SampleState]) -> int:
        """Return how many of the first ``waiting`` sequences fit beside the batch, with some slack for all to grow."""
        most = min(len(waiting), self._max_running - len(self.sequences))
        if most == 0:
            return 0
        capacity = max(map(self._slots_soon, self.sequences), default=0)
        num_prefixes, longest = _prefix_shape(self.groups)
        new: set[int] = set()
        for index, sequence in enumerate(waiting[:most]):
            group = sequence.group
            capacity = max(capacity, self._slots_soon(sequence))
            if not self._has_prompt(group) and group.key not in new:
                new.add(group.key)
                num_prefixes, longest = num_prefixes + 1, max(longest, group.num_prompt_tokens)
            if not self._cache.fits((len(self.sequences) + index + 1, capacity), (num_prefixes, longest)):
                return index
        return most

    def add(self, sequence: SampleState) -> None:
        """Give a sequence the next row, and its shared prompt one if it has none; memory follows with ``allocate``."""
        group = sequence.group
        group.num_in_batch += 1
        sequence.num_prefilled = 0
        self.sequences.append(sequence)
        if not self._has_prompt(group):
            group.prefix_row = len(self.groups)
            self.groups.append(group)

    def allocate(self) -> bool:
        """Make room for the prefill of every sequence here and for its next round; False if the bound forbids it."""
        own = len(self.sequences), max(map(self._slots, self.sequences), default=0)
        if not self._cache.reserve(own, _prefix_shape(self.groups), self._worst_case()):
            return False
        for follower in self._caches[1:]:
            follower.follow(self._cache)
        return True

    def promote(self) -> SampleState:
        """Let the oldest sequence being prefilled run from now on."""
        self.num_running += 1
        return self.sequences[self.num_running - 1]

    def remove(self, row: int) -> SampleState:
        """Free a row; others move so that rows stay dense. The sample keeps the experts that made its tokens."""
        removed = self.sequences[row]
        if removed.logprobs:
            removed.note_routing(self.routed_experts(row))
        self._clear(row)
        if row < self.num_running:
            self.num_running -= 1
            last = self.sequences[self.num_running]
            # One slot more: a draft's state of a shared prompt's last token is the sample's own.
            self._move(self.num_running, row, last.own_len + 1)
            row = self.num_running
        for source in range(row + 1, len(self.sequences)):
            self._move(source, source - 1, self.sequences[source].num_prefilled)
        self.sequences.pop()
        removed.group.num_in_batch -= 1
        return removed

    def release_prompt(self, group: Group) -> None:
        """Free the row of a shared prompt that no sequence of the batch needs."""
        assert group.num_in_batch == 0, "a prompt in use is not released"
        last = self.groups.pop()
        for cache in self._caches:
            cache.prefixes.clear_row(group.prefix_row, group.num_prompt_tokens)
        if last is not group:
            for cache in self._caches:
                cache.prefixes.move_row(len(self.groups), group.prefix_row, last.num_prefilled)
                cache.prefixes.clear_row(len(self.groups), last.num_prompt_tokens)
            self.groups[group.prefix_row] = last
            last.prefix_row = group.prefix_row
        group.drop_prompt()

    def kv_row(self, row: int) -> KvRow:
        group = self.sequences[row].group
        return KvRow(row, group.prefix_row, group.prefix_tokens)

    def span(self, row: int, draft: AnyDraft) -> RowSpan:
        """Return a row's span in a decode or verify pass: the row's last token and the draft that follows the token."""
        sequence = self.sequences[row]
        group = sequence.group
        parents = None
        if isinstance(draft, Draft) and not draft.is_chain:  # the device itself places a tree that is not read
            parents = (-1, *(parent + 1 for parent in draft.parents))
        count = 1 + draft.num_tokens
        return RowSpan(row, sequence.own_len, count, group.prefix_row, group.prefix_tokens, parents)

    def routed_experts(self, row: int) -> RoutedExperts | None:
        """Return the experts of the tokens whose KV a row and its shared prompt hold; None where none are recorded."""
        sequence, own, prefixes = self.sequences[row], self._cache.own, self._cache.prefixes
        if not own.experts:
            return None
        group = sequence.group
        parts = [prefixes.experts_of(group.prefix_row, group.num_prefilled)] if group.shares_prompt else []
        if group.prefix_ready:
            length = sequence.own_len if row < self.num_running else sequence.num_prefilled
            parts.append(own.experts_of(row, length))
        return RoutedExperts.of(torch.cat(parts).numpy())

    def compact(self, spans: Sequence[RowSpan], paths: Sequence[tuple[int, ...]]) -> None:
        """Move the accepted nodes' keys and values to the front of their rows, where those of a chain lie already."""
        moves = [
            (span.row, span.start + 1 + node, span.start + 1 + depth)
            for span, path in zip(spans, paths, strict=True)
            for depth, node in enumerate(path)
            if node != depth
        ]
        if moves:
            self._cache.own.move_slots(moves)

    @property
    def kv_tokens_used(self) -> int:
        """Return the number of positions that hold live keys and values, a shared prompt counted once."""
        sequences, num_running = list(self.sequences), self.num_running
        own = sum(each.own_len if row < num_running else each.num_prefilled for row, each in enumerate(sequences))
        return own + sum(group.num_prefilled for group in list(self.groups))

    def _slots(self, sequence: SampleState) -> int:
        """Return the slots of a sequence's row for its prefill and its next round: the root and the drafted tokens."""
        return sequence.prefill_len + 1 + self._headroom

    def _slots_soon(self, sequence: SampleState) -> int:
        return self._slots(sequence) + min(sequence.num_remaining, ADMISSION_SLACK_TOKENS)

    def _worst_case(self) -> int:
        """Return the number of slots that no row can exceed."""
        return max((self._slots(each) + each.num_remaining for each in self.sequences), default=0)

    def _move(self, source: int, target: int, length: int) -> None:
        if source != target and length:
            for cache in self._caches:
                cache.own.move_row(source, target, length)
            self._clear(source)
        self.sequences[target] = self.sequences[source]

    def _clear(self, row: int) -> None:
        """Clear all that a sequence may have written into its row, drafts that were refused included."""
        for cache in self._caches:
            cache.own.clear_row(row, self._slots(self.sequences[row]))

    @staticmethod
    def _has_prompt(group: Group) -> bool:
        return group.prefix_row >= 0 or not group.shares_prompt


def _prefix_shape(groups: Sequence[Group]) -> Shape:
    return len(groups), max((group.num_prompt_tokens for group in groups), default=0)
