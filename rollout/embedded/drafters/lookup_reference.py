"""The reference of lookup and edit follows RTP-LLM's rules by scans, without an index; LookupDrafter must agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def scan(
    sequence: Sequence[int], corpus: Sequence[int], min_match: int, max_match: int, count: int, search_index: int = 0
) -> list[int]:
    """Return what follows the longest suffix that is in ``corpus``, at its first place from ``search_index`` - L on."""
    if min_match > len(sequence):
        return []
    for length in range(min(max_match, len(sequence)), min_match - 1, -1):
        suffix = list(sequence[len(sequence) - length :])
        start = 0 if search_index < length else search_index - length
        while start + length < len(corpus) - 1:
            if list(corpus[start : start + length]) == suffix:
                return list(corpus[start + length : start + length + count])
            start += 1
    return []


@dataclass
class ReferenceRequest:
    """Holds one request's state; calls of ``propose`` and ``verified`` alternate."""

    prompt: Sequence[int]
    advice: Sequence[int]
    edit: bool
    min_match: int
    max_match: int
    first: bool = True
    search_index: int = 0
    ran: bool = False

    def propose(self, sequence: Sequence[int], count: int) -> list[int]:
        """Return at most ``count`` drafts after ``sequence``, the prompt and what was generated."""
        corpus = self.advice or sequence
        proposed = self._edit(sequence, corpus, count) if self.edit else self._scan(sequence, corpus, count)
        if self.advice and not proposed:
            return self._scan(sequence, sequence, count)
        return proposed

    def verified(self, num_accepted: int) -> None:
        if self.ran:
            self.search_index += num_accepted
        self.ran = False

    def _edit(self, sequence: Sequence[int], corpus: Sequence[int], count: int) -> list[int]:
        if self.first:
            self.first, self.ran = False, True
            offset = len(sequence) - len(self.prompt)
            room = max(0, len(corpus) - offset - self.search_index)
            return list(corpus[offset : offset + min(count, room)])
        proposed = self._scan(sequence, corpus, count, self.search_index)
        self.ran = bool(proposed)
        return proposed

    def _scan(self, sequence: Sequence[int], corpus: Sequence[int], count: int, search_index: int = 0) -> list[int]:
        return scan(sequence, corpus, self.min_match, self.max_match, count, search_index)
