"""The coordinator gives one generation's groups to the engines and gives out their samples as they finish.

    requests ─► InFlightGroups.launch ─► EngineCalls.generate ─► EngineCalls.ready: every call with something to read
                      ▲                                                               │
                      ├── room, partial samples ◄── a sample, a stream's end, an engine that serves or not, or died
                      └── InFlightGroups.news ─► EngineCalls.share: what a group's finished samples said, elsewhere

What happens at one engine touches this engine's books alone: a sample costs the same whatever the number of engines.
All groups are looked at only where an engine ceased to serve, and on an abort. This module does not use Ray.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Protocol

from rollout.dispatch import Dispatcher
from rollout.in_flight import InFlightGroup, InFlightGroups
from rollout.split import LEAST_PART
from slime_spec.request_feed import RequestFeed
from slime_spec.types import EarlierReply, GeneratedSample, GroupRequest

logger = logging.getLogger(__name__)

# How long an abort from another thread may go unnoticed while nothing arrives.
ABORT_POLL_S = 0.2
# How long a request that comes while the generation runs may go unnoticed while nothing arrives.
FEED_POLL_S = 0.01

Call = Hashable
"""A call to an engine whose results come later: a stream of samples, or a watch."""


class EngineProcessDied(RuntimeError):
    """An engine's own process has ended and is not restarted: its weights and its part in pushes are gone."""


class EngineCalls(Protocol):
    """Calls engines in other processes. Reading from a call raises EngineProcessDied where its engine's has ended."""

    def generate(self, engine: int, request: GroupRequest, number: int) -> Call:
        """Have an engine generate a group, and return the stream of its samples."""

    def abort(self, engine: int, numbers: Sequence[int]) -> None:
        """Have an engine end the groups with these numbers now; does not wait."""

    def share(self, engine: int, replies: Mapping[int, Sequence[EarlierReply]]) -> None:
        """Have an engine draft from replies, by the number of the group whose samples gave them; does not wait."""

    def watch(self, engine: int, known: bool) -> Call:
        """Have an engine report when it serves or not, other than ``known`` (MayStopServing)."""

    def ready(self, calls: list[Call], timeout_s: float) -> Sequence[Call]:
        """Return every call with something to read; where none has, wait up to ``timeout_s`` for the first."""

    def next_sample(self, stream: Call) -> GeneratedSample | None:
        """Return the next sample of a ready stream, None at its end."""

    def serves(self, watch: Call) -> bool:
        """Return what a ready watch reports."""


class PendingCalls:
    """Keeps the calls that are waited for in one list, which no event copies: the last takes a removed call's place."""

    def __init__(self, calls: Iterable[Call] = ()) -> None:
        self.calls: list[Call] = list(calls)
        self._places = {call: place for place, call in enumerate(self.calls)}

    def add(self, call: Call) -> None:
        self._places[call] = len(self.calls)
        self.calls.append(call)

    def remove(self, call: Call) -> None:
        place, last = self._places.pop(call), self.calls.pop()
        if last is not call:
            self.calls[place] = last
            self._places[last] = place


class Coordinator:
    """Runs generations over all engines, one at a time, and knows which engines serve.

    An engine that does not serve gets no group until it serves again, and other engines that serve resume its partial
    samples; where no engine serves, samples wait in their engine. An engine whose process dies is lost: other engines
    take its samples as they were when it got them, and an ERROR is logged. ``samples_per_engine`` is what an engine may
    owe at once; ``least_part`` what a split group gives each engine at least (rollout.split), None to split none.
    ``shares_replies``: engines draft from the finished samples of a group, those of other engines too: these go with
    the requests for the group's other samples, and to engines that already run some of them.
    """

    def __init__(
        self,
        calls: EngineCalls,
        num_engines: int,
        samples_per_engine: int,
        least_part: int | None = LEAST_PART,
        shares_replies: bool = False,
    ) -> None:
        self._shares_replies = shares_replies
        self._calls, self._samples_per_engine, self._least_part = calls, samples_per_engine, least_part
        self._serving = [True] * num_engines
        self._dead: dict[int, EngineProcessDied] = {}
        self._watches: dict[Call, int] = {}
        self._streams: dict[Call, InFlightGroup] = {}
        self._pending = PendingCalls()
        self._numbers = count()
        self._num_aborts = 0

    def generate(self, requests: Sequence[GroupRequest] | RequestFeed) -> Iterator[GeneratedSample]:
        """Give out every sample as it finishes; of a feed, until it is closed. An abort closes it.

        Raises what ended an engine for good (EngineFailed), and EngineProcessDied once no engine's process is left.
        """
        dispatcher = Dispatcher(self._serving, self._samples_per_engine)
        feed = requests if isinstance(requests, RequestFeed) else None
        known = () if isinstance(requests, RequestFeed) else requests
        groups = InFlightGroups(known, dispatcher, self._numbers, self._least_part, self._shares_replies)
        return self._samples(groups, feed, self._num_aborts)

    def abort(self) -> None:
        """End the generation in progress, if there is one, as Engines says; may be called from any thread."""
        self._num_aborts += 1

    def _samples(self, groups: InFlightGroups, feed: RequestFeed | None, num_aborts: int) -> Iterator[GeneratedSample]:
        self._streams = {}
        self._hear_all()
        while groups.has_unfinished or (feed is not None and feed.has_more):
            is_aborted = self._num_aborts > num_aborts  # read once: no group may come after an abort
            if feed is not None:
                if is_aborted:
                    feed.close()
                groups.add(feed.taken())
            if is_aborted and not groups.is_aborted:
                self._abort(groups.on_engines)
                yield from groups.abort()
            self._launch(groups)
            for call in self._ready(ABORT_POLL_S if feed is None else FEED_POLL_S):
                if call in self._watches:
                    self._hear(call)
                    self._abort(groups.recall())
                else:
                    yield from self._next(call, groups)
                self._launch(groups)
                if self._num_aborts > num_aborts and not groups.is_aborted:
                    break  # the rest stays ready
            self._share(groups)

    def _ready(self, timeout_s: float) -> Sequence[Call]:
        """Return the calls with something to read; raises EngineProcessDied where no engine is left."""
        if len(self._dead) == len(self._serving):
            *_, last = self._dead.values()
            raise EngineProcessDied(f"no engine is left: their processes have died, the last so: {last}") from last
        return self._calls.ready(self._pending.calls, timeout_s)

    def _launch(self, groups: InFlightGroups) -> None:
        for group in groups.launch():
            stream = self._calls.generate(group.engine, group.request, group.number)
            self._streams[stream] = group
            self._pending.add(stream)

    def _next(self, stream: Call, groups: InFlightGroups) -> list[GeneratedSample]:
        """Return the caller's samples out of the next item of a stream."""
        group = self._streams[stream]
        try:
            sample = self._calls.next_sample(stream)
        except EngineProcessDied as error:
            self._close(stream)
            self._bury(group.engine, error)
            samples = groups.lost(group)
            self._abort(groups.recall())
            return samples
        if sample is None:
            self._close(stream)
            return groups.ended(group)
        arrived = groups.arrived(group, sample)
        return [] if arrived is None else [arrived]

    def _close(self, stream: Call) -> None:
        del self._streams[stream]
        self._pending.remove(stream)

    def _abort(self, groups: Sequence[InFlightGroup]) -> None:
        numbers = defaultdict(list)
        for group in groups:
            numbers[group.engine].append(group.number)
        for engine in numbers.keys() - self._dead.keys():
            self._calls.abort(engine, numbers[engine])

    def _share(self, groups: InFlightGroups) -> None:
        """Tell engines, in one call each, what samples of their groups said that have finished elsewhere."""
        replies: defaultdict[int, dict[int, Sequence[EarlierReply]]] = defaultdict(dict)
        for group, heard in groups.news():
            replies[group.engine][group.number] = heard
        for engine in replies.keys() - self._dead.keys():
            self._calls.share(engine, replies[engine])

    def _hear_all(self) -> None:
        """Note what has changed since the last generation; a server that was lost and replaced reports twice."""
        self._pending = PendingCalls(self._watches)
        for engine in set(range(len(self._serving))) - self._dead.keys() - set(self._watches.values()):
            self._watch(engine)
        timeout_s = 0.0
        while heard := self._ready(timeout_s):
            for watch in heard:
                self._hear(watch)
            timeout_s = ABORT_POLL_S

    def _watch(self, engine: int) -> None:
        """Have an engine report when it starts or stops serving."""
        watch = self._calls.watch(engine, self._serving[engine])
        self._watches[watch] = engine
        self._pending.add(watch)

    def _hear(self, watch: Call) -> None:
        """Note what an engine reports, and have it report again."""
        engine = self._watches.pop(watch)
        self._pending.remove(watch)
        try:
            serves = self._calls.serves(watch)
        except EngineProcessDied as error:
            self._bury(engine, error)
            return
        if engine in self._dead:
            return  # the report is older than the death
        self._serving[engine] = serves
        logger.warning("engine %s engine=%d", "serves again" if self._serving[engine] else "lost its server", engine)
        self._watch(engine)

    def _bury(self, engine: int, error: EngineProcessDied) -> None:
        """Go on without an engine whose process has died."""
        if engine in self._dead:
            return
        self._dead[engine] = error
        self._serving[engine] = False
        logger.error("engine process died, others take over its samples engine=%d error=%s", engine, error)
