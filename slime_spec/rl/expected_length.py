"""ExpectedLengths estimates how many tokens open groups still need, so that engines get the longest groups first.

A group that begins late and is long keeps a step waiting while every other engine has nothing to do. Only the order in
which engines get the groups depends on the estimate: which prompts are drawn does not, and neither do their samples.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from itertools import accumulate

from slime_spec.rl.open_group import OpenGroup
from slime_spec.types import GeneratedSample, Prompt

MAX_PROMPTS = 100_000
MAX_RECENT = 4096


class Lengths:
    """Holds lengths of replies, to ask how long a reply becomes that has already come so far.

    Example: ``Lengths([10, 20, 60]).mean_beyond(10) == 40.0``
    """

    def __init__(self, lengths: Iterable[int]) -> None:
        self._sorted = sorted(lengths)
        self._sums = [0, *accumulate(self._sorted)]

    def mean_beyond(self, num_tokens: int) -> float | None:
        """Return the mean length of the replies longer than ``num_tokens``; None where there are none."""
        first = bisect_right(self._sorted, num_tokens)
        num = len(self._sorted) - first
        return (self._sums[-1] - self._sums[first]) / num if num else None


class ExpectedLengths:
    """Remembers the lengths of replies that have ended: each prompt's last group, and the run's last replies.

    Prompts are known by their token ids, so a prompt's replies of an earlier epoch count for it.
    """

    def __init__(self, max_prompts: int = MAX_PROMPTS, max_recent: int = MAX_RECENT) -> None:
        self._max_prompts = max_prompts
        self._by_prompt: OrderedDict[int, tuple[int, ...]] = OrderedDict()  # by a hash: a collision costs an order
        self._recent: deque[int] = deque(maxlen=max_recent)

    def note(self, prompt: Prompt, responses: Sequence[GeneratedSample]) -> None:
        """Note the lengths of a complete group; samples that an engine broke off say nothing."""
        lengths = tuple(len(each.token_ids) for each in responses if each.finish_reason != "abort")
        if not lengths:
            return
        self._recent.extend(lengths)
        key = hash(prompt.token_ids)
        self._by_prompt[key] = lengths
        self._by_prompt.move_to_end(key)
        if len(self._by_prompt) > self._max_prompts:
            self._by_prompt.popitem(last=False)

    def longest_first(self, groups: Iterable[OpenGroup]) -> list[OpenGroup]:
        """Return groups by the tokens that their longest sample still needs, as expected; equal ones stay in order."""
        recent = Lengths(self._recent)
        return sorted(groups, key=lambda group: -self._rest_of(group, recent))

    def _rest_of(self, group: OpenGroup, recent: Lengths) -> float:
        of_prompt = Lengths(self._by_prompt.get(hash(group.prompt.token_ids), ()))
        had = [len(partial.token_ids) for partial in group.partials.values()] or [0]
        return max(_rest(num_tokens, of_prompt, recent) for num_tokens in had)


def _rest(num_tokens: int, of_prompt: Lengths, recent: Lengths) -> float:
    """Return how many tokens more a sample of ``num_tokens`` is expected to have.

    Replies that came further say so: the same prompt's, or else the run's. A sample that has come further than all of
    them is expected to double.
    """
    for lengths in (of_prompt, recent):
        if (mean := lengths.mean_beyond(num_tokens)) is not None:
            return mean - num_tokens
    return float(num_tokens)
