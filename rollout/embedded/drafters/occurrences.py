"""Occurrences says where the latest tokens stood before in texts that grow, by hash chains as in zlib's deflate.

Of every n-gram of a few lengths a table holds the latest place, and of every place an array holds the place before it
of the same n-gram. A token costs two entries when it is indexed, whatever the length of the matches that are found; a
search compares the latest places of the longest n-gram that occurs, token by token, backwards. A hash that two n-grams
share costs one comparison and changes nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

SHORTEST_MATCH = 2
LONGEST_MATCH = 8  # longer ones are equals: what followed most of them says more than the longest alone
INDEXED = (4, SHORTEST_MATCH)  # n-grams with a table; the first that occurs is searched
LOOKED_AT = 16  # places of one n-gram that a search compares, the latest first
END_OF_TEXT = -1  # no token equals it
NOWHERE = -1


class Match(NamedTuple):
    """Holds the places after the occurrences of the longest suffix, latest first, and the suffix's length."""

    length: int
    places: list[int]


class Continuation(NamedTuple):
    """Holds a token that follows, and the weights of the places that it follows and of all that were asked."""

    token_id: int
    weight: float
    total: float


class Occurrences:
    """Indexes texts, each with a weight; the last one may go on.

    The first ``num_context`` tokens of a text are compared with, but nothing is drafted from among them: a reply's
    first tokens are matched by the end of its prompt.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._weights = array("d")  # of every token's text
        self._start = 0  # of the last text
        self._latest: tuple[dict[int, int], ...] = tuple({} for _ in INDEXED)
        self._before = tuple(array("i") for _ in INDEXED)

    def __len__(self) -> int:
        return len(self._tokens)

    def add(self, token_ids: Sequence[int], weight: float = 1.0, num_context: int = 0) -> None:
        """Add a whole text."""
        self.extend(token_ids, weight, num_context)
        self._tokens.append(END_OF_TEXT)
        self._weights.append(weight)
        for before in self._before:
            before.append(NOWHERE)
        self._start = len(self._tokens)

    def extend(self, token_ids: Sequence[int], weight: float = 1.0, num_context: int = 0) -> None:
        """Let the last text go on."""
        tokens, start = self._tokens, self._start
        first = len(tokens)
        begin = first + num_context
        tokens.extend(token_ids)
        self._weights.extend([weight] * len(token_ids))
        for length, latest, before in zip(INDEXED, self._latest, self._before, strict=True):
            for end in range(first + 1, len(tokens) + 1):
                if end < begin or end - start < length:
                    before.append(NOWHERE)
                    continue
                key = hash(tuple(tokens[end - length : end]))
                before.append(latest.get(key, NOWHERE))
                latest[key] = end - 1

    def longest(self, tail: list[int]) -> Match | None:
        """Return the longest suffix of ``tail`` that was continued; ``tail`` are at most LONGEST_MATCH tokens."""
        if not self._tokens:
            return None
        for length, latest, before in zip(INDEXED, self._latest, self._before, strict=True):
            if length > len(tail):
                continue
            place = latest.get(hash(tuple(tail[-length:])), NOWHERE)
            if place >= 0 and (found := self._compare(tail, place, before, length)) is not None:
                return found
        return None

    def continuations(self, places: list[int], limit: int) -> list[Continuation]:
        """Return token after token what followed most of the places, by weight; of equals, what followed the latest.

        Places that were followed by something else no longer count. At most ``limit`` tokens.
        """
        tokens, weights = self._tokens, self._weights
        found: list[Continuation] = []
        while len(places) > 1 and len(found) < limit:
            votes: dict[int, float] = {}
            for place in places:
                token_id = tokens[place]
                votes[token_id] = votes.get(token_id, 0.0) + weights[place]
            token_id = max(votes, key=votes.__getitem__)
            found.append(Continuation(token_id, votes[token_id], sum(votes.values())))
            places = [place + 1 for place in places if tokens[place] == token_id and self._goes_on(place + 1)]
        for place in places:  # the last that is left goes on alone
            weight = weights[place]
            for token_id in tokens[place : place + limit - len(found)]:
                if token_id == END_OF_TEXT:
                    break
                found.append(Continuation(token_id, weight, weight))
        return found

    def _compare(self, tail: list[int], place: int, before: array[int], shortest: int) -> Match | None:
        tokens, most = self._tokens, len(tail)
        longest, places = shortest, []
        for _ in range(LOOKED_AT):
            if self._goes_on(place + 1):
                length = most if tokens[max(0, place + 1 - most) : place + 1] == tail else self._common(tail, place)
                if length > longest:
                    longest, places = length, [place + 1]
                elif length == longest:
                    places.append(place + 1)
            place = before[place]
            if place < 0:
                break
        return Match(longest, places) if places else None

    def _common(self, tail: list[int], place: int) -> int:
        """Return how many last tokens of ``tail`` end at ``place``."""
        tokens, length, most = self._tokens, 0, min(len(tail), place + 1)
        while length < most and tokens[place - length] == tail[-1 - length]:
            length += 1
        return length

    def _goes_on(self, place: int) -> bool:
        return place < len(self._tokens) and self._tokens[place] != END_OF_TEXT
