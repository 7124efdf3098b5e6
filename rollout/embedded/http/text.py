"""From tokens to text: whole responses as SGLang cuts them, and responses that are still growing."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rollout.embedded.http.sampling import Sampling
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.types import GeneratedSample

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of the first bytes of a character


def response_text(tokenizer: Tokenizer, sample: GeneratedSample, sampling: Sampling) -> str:
    """The response without what ended it: the stop token is not decoded, the text is cut at the stop string.

    ``no_stop_trim`` keeps the token, and the stop string itself. Token ids are never cut.
    """
    matched = sample.matched_stop
    token_ids = sample.token_ids
    if isinstance(matched, int) and sampling.trim_stop:
        token_ids = token_ids[:-1]
    text = tokenizer.decode(token_ids, skip_special=sampling.skip_special_tokens)
    if isinstance(matched, str) and (found := text.find(matched)) >= 0:
        text = text[: found if sampling.trim_stop else found + len(matched)]
    return text


class GrowingText:
    """The text of a response that is being generated: what it holds back may still change, what it shows may not.

    Held back are the first bytes of an unfinished character and whatever may become a stop string that will be cut.
    ``enders`` are the tokens that end a response, whose text is cut too.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: Sampling, enders: Collection[int]) -> None:
        self._tokenizer, self._sampling = tokenizer, sampling
        self._cut = enders if sampling.trim_stop else ()
        self._token_ids: list[int] = []
        self._text = ""
        # Tokens from _context on are decoded again with each addition, those before _settled are part of _text; the
        # context lets a decoder that treats the first token of a text differently see that it is not the first.
        self._context = self._settled = 0

    def add(self, token_ids: Sequence[int]) -> str:
        """Take new tokens; the text that is settled so far."""
        self._token_ids.extend(token for token in token_ids if token not in self._cut)
        before = self._decode(self._context, self._settled)
        after = self._decode(self._context, len(self._token_ids))
        if len(after) > len(before) and not after.endswith(UNFINISHED):
            self._text += after[len(before) :]
            self._context, self._settled = self._settled, len(self._token_ids)
        return self._text[: len(self._text) - self._held_back()]

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._token_ids[start:end], skip_special=self._sampling.skip_special_tokens)

    def _held_back(self) -> int:
        """Characters at the end that a stop string may begin with, or that are one already."""
        if not (self._sampling.params.stop and self._sampling.trim_stop):
            return 0
        found = [self._text.find(stop) for stop in self._sampling.params.stop]
        if any(position >= 0 for position in found):
            return len(self._text) - min(position for position in found if position >= 0)
        return max(
            (
                length
                for stop in self._sampling.params.stop
                for length in range(1, len(stop))
                if self._text.endswith(stop[:length])
            ),
            default=0,
        )
