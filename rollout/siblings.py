"""Siblings brings what finished samples of a group said to every other part of the group that is in flight.

    a part is sent  ──► with its request go all samples of its group that have finished      (sent)
    a part runs     ──► what other parts have finished since then comes as news, once a wait  (news)

Only drafts depend on it: what comes late, or never, changes no sample.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from typing import Generic, TypeVar

from slime_spec.partial_samples import as_earlier, with_siblings
from slime_spec.types import EarlierReply, GeneratedSample, GroupRequest

Part = TypeVar("Part", bound=Hashable)

# The first samples of a group that come as news. A part has eight samples or more (rollout.split), so that news costs a
# group at most four replies for each of its samples, however many parts it has.
MAX_NEWS = 32


class Siblings(Generic[Part]):
    """Keeps the finished samples of every group, and how many of them each part in flight knows of. Example::

    request = siblings.sent(part, request)
    siblings.finished(part, sample)
    for part, replies in siblings.news().items(): ...
    siblings.ended(part, group_id)
    """

    def __init__(self) -> None:
        self._finished: defaultdict[str, list[tuple[Part, GeneratedSample]]] = defaultdict(list)
        self._num_told: defaultdict[str, dict[Part, int]] = defaultdict(dict)  # by group, of each part in flight
        self._with_news: dict[str, None] = {}  # groups, in order

    def sent(self, part: Part, request: GroupRequest) -> GroupRequest:
        """Note a part that is sent now, and return its request with all that its group's finished samples said."""
        finished = self._finished.get(request.group_id, [])
        self._num_told[request.group_id][part] = len(finished)
        return with_siblings(request, [sample for _, sample in finished]) if finished else request

    def finished(self, part: Part, sample: GeneratedSample) -> None:
        """Note a finished sample of a part in flight."""
        finished = self._finished[sample.group_id]
        finished.append((part, sample))
        if len(self._num_told[sample.group_id]) > 1 and len(finished) <= MAX_NEWS:
            self._with_news[sample.group_id] = None

    def ended(self, part: Part, group_id: str) -> None:
        """Note that a part is in flight no longer."""
        del self._num_told[group_id][part]

    def news(self) -> dict[Part, tuple[EarlierReply, ...]]:
        """Return what each part in flight has not heard of, each sample once; a part's own samples are no news."""
        news = {}
        for group_id in self._with_news:
            finished, num_told = self._finished[group_id][:MAX_NEWS], self._num_told[group_id]
            for part, num in num_told.items():
                replies = tuple(as_earlier(sample) for of_part, sample in finished[num:] if of_part is not part)
                num_told[part] = max(num, len(finished))
                if replies:
                    news[part] = replies
        self._with_news = {}
        return news
