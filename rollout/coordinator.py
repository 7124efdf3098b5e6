"""The coordinator gives one generation's groups to the engines and gives out their samples as they finish.

    requests ─► InFlightGroups.launch ─► EngineCalls.generate ─► EngineCalls.ready: every call with something to read
                      ▲                                                               │
                      ├── room, partial samples ◄── a sample, a stream's end, an engine that serves or not, or died
                      ├── EngineCalls.replace ─► another process in place of one that died, which joins once it started
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
    """An engine's own process has ended: its weights and its part in pushes are gone, until another is made."""


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

    def replace(self, engine: int) -> Call | None:
        """Have another process start in place of a dead one; None where no further one may."""

    def join(self, engine: int, start: Call) -> bool:
        """Bring an engine whose ready ``start`` is over to the weights that the others serve; False: not yet.

        Raises EngineProcessDied where it did not start or did not take them.
        """


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
    samples; where no engine serves, samples wait in their engine. Where an engine's process dies, other engines take
    its samples as they were when it got them, an ERROR is logged, and another process is started in its place
    (EngineCalls.replace), which gets groups once it has joined. ``samples_per_engine`` is what an engine may
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
        self._unreplaced: set[int] = set()  # dead, and nothing starts in their place
        self._newly_dead: set[int] = set()  # with samples that nobody has taken over yet
        self._last_death = ""
        self._starts: dict[Call, int] = {}  # of processes in place of dead ones
        self._started: dict[int, Call] = {}  # ready, and waiting for weights
        self._watches: dict[Call, int] = {}
        self._streams: dict[Call, InFlightGroup] = {}
        self._pending = PendingCalls()
        self._numbers = count()
        self._num_aborts = 0

    def generate(self, requests: Sequence[GroupRequest] | RequestFeed) -> Iterator[GeneratedSample]:
        """Give out every sample as it finishes; of a feed, until it is closed. An abort closes it.

        Raises what ended an engine for good (EngineFailed), and EngineProcessDied once no engine's process is left, and
        at the beginning where a dead one may not be replaced.
        """
        dispatcher = Dispatcher(self._serving, self._samples_per_engine)
        feed = requests if isinstance(requests, RequestFeed) else None
        known = () if isinstance(requests, RequestFeed) else requests
        groups = InFlightGroups(known, dispatcher, self._numbers, self._least_part, self._shares_replies)
        return self._samples(groups, feed, self._num_aborts)

    def abort(self) -> None:
        """End the generation in progress, if there is one, as Engines says; may be called from any thread."""
        self._num_aborts += 1

    def bury(self, engine: int, error: EngineProcessDied) -> None:
        """Go on without an engine whose process has died, until the next generation replaces it."""
        if engine in self._dead:
            return
        self._note_death(engine, error)
        self._newly_dead.add(engine)
        self._serving[engine] = False
        self._forget(self._watches, engine)
        logger.error("engine process died, others take over its samples engine=%d error=%s", engine, error)

    @property
    def living(self) -> list[int]:
        """Return the engines whose process serves or may serve again."""
        return [engine for engine in range(len(self._serving)) if engine not in self._dead]

    @property
    def coming(self) -> dict[int, Call]:
        """Return the starts of processes in place of dead ones that have not joined yet, by engine."""
        return {**{engine: start for start, engine in self._starts.items()}, **self._started}

    def _samples(self, groups: InFlightGroups, feed: RequestFeed | None, num_aborts: int) -> Iterator[GeneratedSample]:
        self._streams = {}
        self._newly_dead.clear()
        self._replace_dead()
        if self._unreplaced:
            raise EngineProcessDied(
                "no more engines may be started anew within the hour (--max-engine-restarts-per-hour); the last one "
                f"died so: {self._last_death}. Look why, and resume the run from its last checkpoint"
            )
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
                if call in self._streams:
                    yield from self._next(call, groups)
                else:
                    self._hear(call)
                    self._abort(groups.recall())
                if self._newly_dead:
                    yield from self._lost(groups)
                self._launch(groups)
                if self._num_aborts > num_aborts and not groups.is_aborted:
                    break  # the rest stays ready
            self._share(groups)

    def _ready(self, timeout_s: float) -> Sequence[Call]:
        """Return the calls with something to read; raises EngineProcessDied where no engine is left or coming."""
        if self._unreplaced:
            self._replace_dead()
        if len(self._dead) == len(self._serving) and not self._starts:
            if self._started:
                raise EngineProcessDied(
                    f"no engine is left that may serve, the last one died so: {self._last_death}. The one in its place "
                    "has no weights: the trainer is ahead of what was pushed (--update-weights-interval); resume the "
                    "run from its last checkpoint"
                )
            raise EngineProcessDied(f"no engine is left: their processes have died, the last so: {self._last_death}")
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
            self.bury(group.engine, error)
            return []
        if sample is None:
            self._close(stream)
            return groups.ended(group)
        arrived = groups.arrived(group, sample)
        return [] if arrived is None else [arrived]

    def _lost(self, groups: InFlightGroups) -> list[GeneratedSample]:
        """Close what dead engines had, for others; returns the caller's samples, where it has aborted."""
        samples = []
        for stream, group in [(stream, group) for stream, group in self._streams.items() if group.engine in self._dead]:
            self._close(stream)
            samples += groups.lost(group)
        self._newly_dead.clear()
        self._abort(groups.recall())
        self._replace_dead()
        return samples

    def _replace_dead(self) -> None:
        """Have a process start in place of each dead one that may be replaced."""
        for engine in list(self._unreplaced):
            start = self._calls.replace(engine)
            if start is not None:
                logger.warning("engine is started anew engine=%d", engine)
                self._unreplaced.remove(engine)
                self._starts[start] = engine
                self._pending.add(start)

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
        self._pending = PendingCalls([*self._watches, *self._starts])
        for engine, start in list(self._started.items()):
            self._join(engine, start)
        for engine in set(self.living) - set(self._watches.values()):
            self._watch(engine)
        timeout_s = 0.0
        while heard := self._ready(timeout_s):
            for call in heard:
                self._hear(call)
            timeout_s = ABORT_POLL_S

    def _watch(self, engine: int) -> None:
        """Have an engine report when it starts or stops serving."""
        watch = self._calls.watch(engine, self._serving[engine])
        self._watches[watch] = engine
        self._pending.add(watch)

    def _hear(self, call: Call) -> None:
        """Note what an engine reports: that it serves or not, and reports again, or that its process has started."""
        if call in self._starts:
            self._pending.remove(call)
            self._join(self._starts.pop(call), call)
        elif call in self._watches:  # and not of an engine that has died meanwhile
            engine = self._watches.pop(call)
            self._pending.remove(call)
            try:
                self._serving[engine] = self._calls.serves(call)
            except EngineProcessDied as error:
                self.bury(engine, error)
                return
            again = "serves again" if self._serving[engine] else "lost its server"
            logger.warning("engine %s engine=%d", again, engine)
            self._watch(engine)

    def _join(self, engine: int, start: Call) -> None:
        """Bring an engine whose process was replaced among the others, or see to it later."""
        self._started[engine] = start
        try:
            if not self._calls.join(engine, start):
                return
        except EngineProcessDied as error:
            logger.error("engine did not start anew engine=%d error=%s", engine, error)
            del self._started[engine]
            self._note_death(engine, error)
            return
        del self._started[engine], self._dead[engine]
        self._serving[engine] = True
        logger.warning("engine was replaced engine=%d", engine)
        self._watch(engine)

    def _note_death(self, engine: int, error: EngineProcessDied) -> None:
        self._dead[engine], self._last_death = error, str(error)
        self._unreplaced.add(engine)

    def _forget(self, calls: dict[Call, int], engine: int) -> None:
        """Wait no longer for an engine's calls."""
        for call in [call for call, of_engine in calls.items() if of_engine == engine]:
            del calls[call]
            self._pending.remove(call)
