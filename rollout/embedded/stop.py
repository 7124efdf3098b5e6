"""A stop rule decides when a response ends: at a stop token, a stop string, or the token budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slime_spec.types import FinishReason, SamplingParams

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Ending:
    """Says why a response ended; for a stop, with the token or the string that matched."""

    reason: FinishReason
    matched: int | str | None = None


class StopRule:
    """Decides after every token whether the response ends; the token that ends a response stays in the response."""

    def __init__(self, eos_token_ids: frozenset[int], decode: Decode) -> None:
        self._eos_token_ids, self._decode = eos_token_ids, decode

    def ending(self, token_ids: Sequence[int], num_prompt_tokens: int, params: SamplingParams) -> Ending | None:
        """Return why the response (what follows the prompt in ``token_ids``) ends with its last token, or None."""
        last = token_ids[-1]
        if last in params.stop_token_ids or (last in self._eos_token_ids and not params.ignore_eos):
            return Ending("stop", last)
        if params.stop:
            matched = self._stop_string(token_ids, num_prompt_tokens, params.stop)
            if matched is not None:
                return Ending("stop", matched)
        return Ending("length") if len(token_ids) - num_prompt_tokens >= params.max_new_tokens else None

    def _stop_string(self, token_ids: Sequence[int], num_prompt_tokens: int, stops: Sequence[str]) -> str | None:
        # A token is at least one byte, so a stop string that ends here began within its own number of bytes; eight
        # more tokens let a character or a word that starts earlier decode whole.
        window = max(len(stop.encode()) for stop in stops) + 8
        text = self._decode(token_ids[max(num_prompt_tokens, len(token_ids) - window) :])
        return next((stop for stop in stops if stop in text), None)
