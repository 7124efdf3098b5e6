"""The reference of HISTORY compares the sequence with every place of every text; HistoryDrafter must agree.

It keeps texts as lists and past drafts as a list, indexes nothing, and takes only the numbers from the fast one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rollout.embedded.drafters.calibration import KEPT, MAJORITY, PRIOR_DRAFTS
from rollout.embedded.drafters.history import HALF_LIFE_VERSIONS, LEAST_REACH, NEAR
from rollout.embedded.drafters.occurrences import INDEXED, LONGEST_MATCH, LOOKED_AT
from slime_spec.types import EarlierReply

Text = tuple[Sequence[int], float, int]  # with its weight, and how many of its first tokens are context
Place = tuple[Sequence[int], int, float]  # in a text, before a token; the text's weight
Kind = tuple[int, int, int]  # of drafts that are alike: source, length of the match, agreement


def places_after(texts: Sequence[Text], suffix: Sequence[int]) -> list[Place]:
    """Return the places behind every occurrence of ``suffix``, the latest first."""
    length = len(suffix)
    return [
        (text, end, weight)
        for text, weight, num_context in reversed(texts)
        for end in range(len(text), max(num_context, length) - 1, -1)
        if list(text[end - length : end]) == list(suffix)
    ]


def common_length(place: Place, tail: Sequence[int]) -> int:
    text, end, _ = place
    lengths = range(min(end, len(tail)), 0, -1)
    return next((length for length in lengths if list(text[end - length : end]) == list(tail[-length:])), 0)


def longest_match(texts: Sequence[Text], tail: Sequence[int]) -> tuple[int, list[Place]] | None:
    """Return the longest match and its places that are continued, among the latest LOOKED_AT."""
    for length in INDEXED:
        if length > len(tail):
            continue
        latest = places_after(texts, tail[-length:])[:LOOKED_AT]
        continued = [place for place in latest if place[1] < len(place[0])]
        if continued:
            longest = max(common_length(place, tail) for place in continued)
            return longest, [place for place in continued if common_length(place, tail) == longest]
    return None


@dataclass
class ReferenceHistory:
    """Drafts for the samples of one prompt."""

    prompt: Sequence[int]
    came_with_request: Sequence[EarlierReply] = ()
    siblings: list[Text] = field(default_factory=list)
    judged: list[tuple[Kind, bool]] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)  # of the last draft
    last: tuple[Sequence[int], Sequence[int]] = ((), ())  # (reply, its draft)
    earlier: list[Text] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.siblings = [self._aged(each) for each in self.came_with_request if each.is_sibling]
        self.earlier = [self._aged(each) for each in self.came_with_request if not each.is_sibling]

    def finished(self, reply: Sequence[int]) -> None:
        self.siblings.append(self._behind_prompt(reply))

    def propose(self, reply: Sequence[int], count: int) -> tuple[list[int], list[float]]:
        """Return at most ``count`` drafts after ``reply``, and what is expected of each."""
        self._judge(reply)
        tail = [*self.prompt, *reply][-LONGEST_MATCH:]
        best = None
        for source, texts in enumerate(
            (self.siblings, self.earlier, [self._behind_prompt(reply)], [(self.prompt, 1.0, 0)])
        ):
            match = longest_match(texts, tail)
            if match is not None and (best is None or match[0] > best[1] + NEAR):
                best = source, *match
        self.kinds = []
        chain, expected = ([], []) if best is None else self._chain(*best, count)
        self.last = list(reply), chain
        return chain, expected

    def _judge(self, reply: Sequence[int]) -> None:
        """Compare the last draft, which was made for the same sample, with what followed."""
        before, chain = self.last
        for kind, ours, theirs in zip(self.kinds, chain, reply[len(before) :], strict=False):
            self.judged.append((kind, ours == theirs))
            if ours != theirs:
                return

    def _behind_prompt(self, reply: Sequence[int], weight: float = 1.0) -> Text:
        context = self.prompt[-LONGEST_MATCH:]
        return [*context, *reply], weight, len(context)

    def _aged(self, reply: EarlierReply) -> Text:
        age = max(each.weight_version for each in self.came_with_request) - reply.weight_version
        return self._behind_prompt(reply.token_ids, 0.5 ** (age / HALF_LIFE_VERSIONS))

    def _chain(self, source: int, length: int, places: list[Place], count: int) -> tuple[list[int], list[float]]:
        chain: list[int] = []
        expected: list[float] = []
        reach = 1.0
        while places and len(chain) < count:
            following = [text[end] for text, end, _ in places]
            weights = {token: sum(place[2] for place in places if place[0][place[1]] == token) for token in following}
            heaviest = max(weights.values())
            token = next(token for token in following if weights[token] == heaviest)
            total = sum(weights.values())
            agreement = (heaviest >= MAJORITY * total) + (heaviest == total)
            kind = source, min(length + len(chain), LONGEST_MATCH), agreement
            expectation = self._expected(kind, heaviest / (total + 1.0))
            reach *= expectation
            if chain and reach < LEAST_REACH:
                break
            chain.append(token)
            expected.append(expectation)
            self.kinds.append(kind)
            places = [(text, end + 1, weight) for text, end, weight in places if text[end] == token]
            places = [place for place in places if place[1] < len(place[0])]
        return chain, expected

    def _expected(self, kind: Kind, by_places: float) -> float:
        alike = [accepted for each, accepted in self.judged if each == kind]
        ages = range(len(alike) - 1, -1, -1)
        num_judged = sum(KEPT**age for age in ages)
        num_accepted = sum(KEPT**age for age, accepted in zip(ages, alike, strict=True) if accepted)
        return (num_accepted + PRIOR_DRAFTS * by_places) / (num_judged + PRIOR_DRAFTS)
