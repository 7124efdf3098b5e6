"""InFlightGroups tracks where each group of a generation is: waiting, in flight on an engine, or between two engines.

    waiting ──launch──► in flight on an engine ──arrived──► finished: to the caller
       ▲                     │
       │                     ├─ recalled, where its engine does not serve while another does: ends as if aborted
       └──────unfinished─────┴─ lost, where the engine's process died

A group that is sent again resumes the partial samples that came back (slime_spec.partial_samples). This module does not
use Ray and never waits.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from rollout.dispatch import Dispatcher
from rollout.siblings import Siblings
from rollout.split import divided
from slime_spec.partial_samples import (
    MAX_FRUITLESS_ATTEMPTS,
    FruitlessAttempts,
    as_partial,
    request_for_rest,
)
from slime_spec.types import EarlierReply, GeneratedSample, GroupRequest


@dataclass(eq=False)
class InFlightGroup:
    """Records a group on an engine: ``left`` maps awaited sample indices to positions, ``back`` are partial samples."""

    number: int
    engine: int
    request: GroupRequest
    left: dict[int, int] = field(default_factory=dict)
    back: list[GeneratedSample] = field(default_factory=list)
    is_recalled: bool = False

    def __post_init__(self) -> None:
        self.left = {index: position for position, index in enumerate(self.request.sample_indices)}


class InFlightGroups:
    """Tracks all groups of one generation; gives the caller each of their samples once. ``numbers`` name the groups.

    Example::

        groups = InFlightGroups(requests, dispatcher, itertools.count())
        for group in groups.launch(): ...           # have the engine generate group.request
        sample = groups.arrived(group, sample)      # for each that comes back; None where it is resumed elsewhere
        samples = groups.ended(group)               # when nothing more comes
    """

    def __init__(
        self,
        requests: Iterable[GroupRequest],
        dispatcher: Dispatcher,
        numbers: Iterator[int],
        least_part: int | None = None,
        shares_replies: bool = False,
    ) -> None:
        """With ``shares_replies`` what samples of a group said reaches its other samples (rollout.siblings)."""
        self._waiting = deque(requests)
        self._dispatcher, self._numbers, self._least_part = dispatcher, numbers, least_part
        self._siblings = Siblings[InFlightGroup]() if shares_replies else None
        self._on_engines: dict[InFlightGroup, None] = {}  # in the order in which they were sent
        self._fruitless: defaultdict[tuple[str, int], FruitlessAttempts] = defaultdict(FruitlessAttempts)
        self.is_aborted = False

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._on_engines)

    @property
    def on_engines(self) -> list[InFlightGroup]:
        return list(self._on_engines)

    def add(self, requests: Iterable[GroupRequest]) -> None:
        """Have groups wait that have come since; none may come after an abort."""
        self._waiting.extend(requests)

    def launch(self) -> list[InFlightGroup]:
        """Give waiting groups, in their order, to engines that have room.

        Where more engines are idle than groups wait, the groups are divided over these engines, ``least_part`` samples
        or more to each; without it they stay whole.
        """
        launched = []
        num_waiting = len(self._waiting)
        if self._least_part is not None and num_waiting and (num := self._dispatcher.num_idle_over(num_waiting)):
            self._waiting = deque(divided(self._waiting, num, self._least_part))
        while self._waiting:
            first = self._waiting[0]
            engine = self._dispatcher.assign(len(first.seeds), first.near)
            if engine is None:
                break
            group = InFlightGroup(next(self._numbers), engine, self._waiting.popleft())
            if self._siblings is not None:
                group.request = self._siblings.sent(group, group.request)
            launched.append(group)
        self._on_engines.update(dict.fromkeys(launched))
        return launched

    def recall(self) -> list[InFlightGroup]:
        """Return the groups to abort, each group once: their engines do not serve, and other engines do."""
        serving = self._dispatcher.serving
        if not any(serving):
            return []
        recalled = [group for group in self._on_engines if not (group.is_recalled or serving[group.engine])]
        for group in recalled:
            group.is_recalled = True
        return recalled

    def arrived(self, group: InFlightGroup, sample: GeneratedSample) -> GeneratedSample | None:
        """Return the sample for the caller, or None where its group was recalled before the sample was finished."""
        del group.left[sample.sample_index]
        self._dispatcher.finished(group.engine)
        if group.is_recalled and sample.finish_reason == "abort":
            group.back.append(sample)
            return None
        if self._siblings is not None and sample.finish_reason != "abort":
            self._siblings.finished(group, sample)
        return sample

    def news(self) -> list[tuple[InFlightGroup, tuple[EarlierReply, ...]]]:
        """Return what in-flight groups have not heard of samples that finished elsewhere; each is returned once."""
        if self._siblings is None or self.is_aborted:
            return []
        news = self._siblings.news()
        return [(group, replies) for group, replies in news.items() if group.left and not group.is_recalled]

    def ended(self, group: InFlightGroup, is_lost: bool = False) -> list[GeneratedSample]:
        """Close a group whose stream has ended; its partial samples wait for an engine, or are returned if aborted.

        Raises RuntimeError for a sample that comes back again and again without a new token. What is lost with a
        process does not count: how many processes may die is bounded elsewhere.
        """
        assert not group.left, f"{group.request.group_id} ended with {len(group.left)} samples missing"
        del self._on_engines[group]
        if self._siblings is not None:
            self._siblings.ended(group, group.request.group_id)
        if self.is_aborted or not group.back:
            return group.back
        positions = {index: position for position, index in enumerate(group.request.sample_indices)}
        for sample in () if is_lost else group.back:
            self._note_progress(as_partial(group.request, positions[sample.sample_index]), sample)
        self._waiting.appendleft(request_for_rest(group.request, group.back))
        return []

    def lost(self, group: InFlightGroup) -> list[GeneratedSample]:
        """Close a group whose engine's process has died; its samples are as they were when the engine got them."""
        self._dispatcher.finished(group.engine, len(group.left))
        group.back += [as_partial(group.request, position) for position in group.left.values()]
        group.left = {}
        return self.ended(group, is_lost=True)

    def abort(self) -> list[GeneratedSample]:
        """Return the waiting groups' samples as they are; the caller has the engines abort the in-flight groups."""
        self.is_aborted = True
        waiting, self._waiting = self._waiting, deque()
        return [as_partial(request, position) for request in waiting for position in range(len(request.seeds))]

    def _note_progress(self, before: GeneratedSample, after: GeneratedSample) -> None:
        if self._fruitless[after.group_id, after.sample_index].note(after.token_ids != before.token_ids):
            raise RuntimeError(
                f"{after.group_id}: sample {after.sample_index} was broken off {MAX_FRUITLESS_ATTEMPTS} times without "
                "a token in between"
            )
