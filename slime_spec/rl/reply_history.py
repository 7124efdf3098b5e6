"""The reply history keeps the latest replies to every prompt, for drafts when the prompt comes again."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import xxhash

from slime_spec.types import EarlierReply, GeneratedSample

MAX_REPLIES = 8  # to one prompt
MAX_TOKENS = 16_000_000  # of all replies, at four bytes each

Kept = tuple["array[int]", int]  # a reply's tokens, and its weight version


class ReplyHistory:
    """Keeps replies by the tokens of their prompts; the prompts asked for longest ago leave first. Example::

    history.note(prompt_token_ids, samples)     # a complete group's
    history.of(prompt_token_ids)                # for the prompt's next request, oldest first
    """

    def __init__(self, max_replies: int = MAX_REPLIES, max_tokens: int = MAX_TOKENS) -> None:
        self._max_replies, self._max_tokens = max_replies, max_tokens
        self._replies: OrderedDict[bytes, list[Kept]] = OrderedDict()
        self.num_tokens = 0

    def note(self, prompt_token_ids: Sequence[int], samples: Iterable[GeneratedSample]) -> None:
        """Keep the replies of samples that were finished."""
        key = _key(prompt_token_ids)
        known = self._replies.pop(key, [])
        new = [
            (array("i", each.token_ids), each.weight_version)
            for each in samples
            if each.token_ids and each.finish_reason != "abort"
        ]
        kept = [*known, *new][-self._max_replies :]
        self.num_tokens += _num_tokens(kept) - _num_tokens(known)
        if kept:
            self._replies[key] = kept
        while self.num_tokens > self._max_tokens:
            _, oldest = self._replies.popitem(last=False)
            self.num_tokens -= _num_tokens(oldest)

    def of(self, prompt_token_ids: Sequence[int]) -> tuple[EarlierReply, ...]:
        """Return the replies to a prompt, oldest first."""
        key = _key(prompt_token_ids)
        if key not in self._replies:
            return ()
        self._replies.move_to_end(key)
        return tuple(EarlierReply(tuple(token_ids), version) for token_ids, version in self._replies[key])


def _key(prompt_token_ids: Sequence[int]) -> bytes:
    """Return a digest: two prompts that shared one would only be drafted for badly."""
    return xxhash.xxh3_128_digest(array("i", prompt_token_ids).tobytes())


def _num_tokens(replies: Iterable[Kept]) -> int:
    return sum(len(token_ids) for token_ids, _ in replies)
