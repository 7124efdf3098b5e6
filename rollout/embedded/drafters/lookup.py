"""Prompt lookup, RTP-LLM's rules: continue the earliest earlier occurrence of the longest matching suffix.

For L from ``max_token_match`` down to ``min_token_match``: find the earliest i with corpus[i : i+L] equal to the last
L tokens and i + L < len(corpus) - 1 (at least two tokens follow); propose what follows it. The corpus is the request's
own sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from slime_spec.config.tree import SpeculativeConfig
from slime_spec.errors import PushError
from slime_spec.interfaces import Draft, DraftContext


class NgramIndex:
    """The earliest position of every n-gram of a growing corpus, for each length of a range.

    The earliest occurrence is enough: the rule's bound on i is an upper one, so if the earliest breaks it, all do.
    """

    def __init__(self, min_match: int, max_match: int) -> None:
        self._lengths = range(max_match, min_match - 1, -1)
        self._earliest: dict[int, dict[tuple[int, ...], int]] = {length: {} for length in self._lengths}
        self._num_indexed = 0

    def extend(self, corpus: Sequence[int]) -> None:
        """Index what was appended to ``corpus`` since the last call."""
        for length in self._lengths:
            earliest = self._earliest[length]
            for end in range(max(self._num_indexed + 1, length), len(corpus) + 1):
                earliest.setdefault(tuple(corpus[end - length : end]), end - length)
        self._num_indexed = len(corpus)

    def continuation(self, sequence: Sequence[int], corpus: Sequence[int], limit: int) -> tuple[int, ...]:
        """At most ``limit`` tokens that followed the suffix of ``sequence`` in the indexed ``corpus``, or none."""
        for length in self._lengths:
            if length > len(sequence):
                continue
            start = self._earliest[length].get(tuple(sequence[-length:]))
            if start is not None and start + length < len(corpus) - 1:
                return tuple(corpus[start + length : start + length + limit])
        return ()


def scan_lookup(
    sequence: Sequence[int], corpus: Sequence[int], min_match: int, max_match: int, limit: int
) -> tuple[int, ...]:
    """The same rule as a plain scan, for tests to hold the index against."""
    for length in range(min(max_match, len(sequence)), min_match - 1, -1):
        suffix = list(sequence[len(sequence) - length :])
        for start in range(len(corpus)):
            if start + length < len(corpus) - 1 and list(corpus[start : start + length]) == suffix:
                return tuple(corpus[start + length : start + length + limit])
    return ()


class LookupDrafter:
    """Drafts chains from each request's own tokens."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self._min_match, self._max_match = config.min_token_match, config.max_token_match
        self._indexes: dict[int, NgramIndex] = {}

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        return [self._propose(context) for context in contexts]

    def observe(self, request_key: int, num_accepted: int) -> None:
        pass

    def forget(self, request_key: int) -> None:
        self._indexes.pop(request_key, None)

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        raise PushError("prompt lookup has no draft weights to update")

    def _propose(self, context: DraftContext) -> Draft:
        index = self._indexes.setdefault(context.request_key, NgramIndex(self._min_match, self._max_match))
        index.extend(context.token_ids)
        chain = index.continuation(context.token_ids, context.token_ids, context.max_draft_tokens)
        return Draft(chain, tuple(range(-1, len(chain) - 1)))
