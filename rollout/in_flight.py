"""Where each group of one generation is: waiting for an engine, on one, or on its way from one to another.

    waiting ──launch──► on an engine ──arrived──► finished: to the caller
       ▲                     │
       │                     ├─ recalled, where its engine does not serve while another does: ends as if aborted
       └──────unfinished─────┴─ lost, where the engine's process died

What is sent again goes on from what came back of it (GroupRequest.begun). Nothing here knows of Ray or waits.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from rollout.dispatch import Dispatcher
from rollout.partial_samples import MAX_FRUITLESS_PARTS, as_begun
from slime_spec.types import GeneratedSample, GroupRequest


@dataclass(eq=False)
class Flight:
    """A group on an engine. ``left`` maps the samples still out to their positions; ``back`` are unfinished ones."""

    number: int
    engine: int
    request: GroupRequest
    left: dict[int, int] = field(default_factory=dict)
    back: list[GeneratedSample] = field(default_factory=list)
    is_recalled: bool = False

    def __post_init__(self) -> None:
        self.left = {index: position for position, index in enumerate(self.request.sample_indices)}


class Flights:
    """All groups of one generation; every sample of theirs is given to the caller once. ``numbers`` names flights.

    Example::

        flights = Flights(requests, dispatcher, itertools.count())
        for flight in flights.launch(): ...           # have the engine generate flight.request
        sample = flights.arrived(flight, sample)      # for each that comes back; None where it goes on elsewhere
        samples = flights.ended(flight)               # when nothing more comes
    """

    def __init__(self, requests: Iterable[GroupRequest], dispatcher: Dispatcher, numbers: Iterator[int]) -> None:
        self._waiting = deque(requests)
        self._dispatcher, self._numbers = dispatcher, numbers
        self._in_air: list[Flight] = []
        self._num_fruitless: Counter[tuple[str, int]] = Counter()
        self.is_aborted = False

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._in_air)

    @property
    def in_air(self) -> list[Flight]:
        return list(self._in_air)

    def launch(self) -> list[Flight]:
        """Give waiting groups, in their order, to engines that have room."""
        launched = []
        while self._waiting and (engine := self._dispatcher.assign(len(self._waiting[0].seeds))) is not None:
            launched.append(Flight(next(self._numbers), engine, self._waiting.popleft()))
        self._in_air += launched
        return launched

    def recall(self) -> list[Flight]:
        """The flights, each told once, to abort: their engines do not serve, and others do."""
        if not any(self._dispatcher.serving):
            return []
        recalled = [each for each in self._in_air if not (each.is_recalled or self._dispatcher.serving[each.engine])]
        for flight in recalled:
            flight.is_recalled = True
        return recalled

    def arrived(self, flight: Flight, sample: GeneratedSample) -> GeneratedSample | None:
        """What the caller gets of it: nothing yet where it was recalled before it was finished."""
        del flight.left[sample.sample_index]
        self._dispatcher.finished(flight.engine)
        if flight.is_recalled and sample.finish_reason == "abort":
            flight.back.append(sample)
            return None
        return sample

    def ended(self, flight: Flight) -> list[GeneratedSample]:
        """Nothing more comes of it; what came back unfinished waits for another engine, or is the caller's if aborted.

        Raises RuntimeError for a sample that comes back again and again without a token more.
        """
        assert not flight.left, f"{flight.request.group_id} ended with {len(flight.left)} samples missing"
        self._in_air.remove(flight)
        if self.is_aborted or not flight.back:
            return flight.back
        request, back = flight.request, sorted(flight.back, key=lambda sample: sample.sample_index)
        positions = {index: position for position, index in enumerate(request.sample_indices)}
        for sample in back:
            self._note_progress(as_begun(request, positions[sample.sample_index]), sample)
        seeds = tuple(request.seeds[positions[sample.sample_index]] for sample in back)
        self._waiting.appendleft(replace(request, seeds=seeds, begun=tuple(back)))
        return []

    def lost(self, flight: Flight) -> list[GeneratedSample]:
        """As ``ended``, where the engine's process has died: its samples are as they were when it got them."""
        self._dispatcher.finished(flight.engine, len(flight.left))
        flight.back += [as_begun(flight.request, position) for position in flight.left.values()]
        flight.left = {}
        return self.ended(flight)

    def abort(self) -> list[GeneratedSample]:
        """The samples whose turn has not come, as they are; what is in the air is for the engines to abort."""
        self.is_aborted = True
        waiting, self._waiting = self._waiting, deque()
        return [as_begun(request, position) for request in waiting for position in range(len(request.seeds))]

    def _note_progress(self, before: GeneratedSample, after: GeneratedSample) -> None:
        key = after.group_id, after.sample_index
        self._num_fruitless[key] = self._num_fruitless[key] + 1 if after.token_ids == before.token_ids else 0
        if self._num_fruitless[key] == MAX_FRUITLESS_PARTS:
            raise RuntimeError(
                f"{after.group_id}: sample {after.sample_index} was broken off {MAX_FRUITLESS_PARTS} times without a "
                "token in between"
            )
