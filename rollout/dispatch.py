"""The dispatcher chooses the engine of the next group: the least loaded engine that serves and has room."""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush


@dataclass
class Dispatcher:
    """Counts the samples that each engine still owes; an engine has room for ``samples_per_engine`` samples.

    Room is a little more than an engine decodes at once, so that its queue never runs dry while late groups can still
    go to whichever engine frees up first. ``serving`` says which engines serve now; its owner changes it.

    The loads are a heap of (samples owed, engine): a changed load is pushed, and an entry that is no engine's load any
    more is dropped when it comes up, so that a call costs O(log engines).
    """

    serving: list[bool]
    samples_per_engine: int
    owed: list[int] = field(default_factory=list)
    _num_idle: int = 0  # engines that owe nothing, whether they serve or not
    _loads: list[tuple[int, int]] = field(default_factory=list, repr=False)
    _not_serving: set[int] = field(default_factory=set, repr=False)  # when their entry came up, and perhaps again now

    def __post_init__(self) -> None:
        self.owed = [0] * len(self.serving)
        self._num_idle = len(self.serving)
        self._rebuild()

    def num_idle_over(self, least: int) -> int:
        """Count the serving engines that owe nothing, or return 0 where they cannot be more than ``least``.

        This walks over all engines only where one of them serves and owes nothing: it will not be so for long.
        """
        if self._num_idle <= least or (engine := self._least_loaded()) is None or self.owed[engine]:
            return 0
        num = sum(serves and not owed for serves, owed in zip(self.serving, self.owed, strict=True))
        return num if num > least else 0

    def assign(self, num_samples: int, near: int | None = None) -> int | None:
        """Reserve an engine for a group: the one that it is ``near``, if that serves and has room, or the least loaded.

        None when all serving engines are full. An idle one never is.
        """
        engine = near
        if engine is None or not self.serving[engine] or not self._has_room(engine, num_samples):
            engine = self._least_loaded()
        if engine is None or not self._has_room(engine, num_samples):
            return None
        self._change(engine, num_samples)
        return engine

    def _has_room(self, engine: int, num_samples: int) -> bool:
        return not self.owed[engine] or self.owed[engine] + num_samples <= self.samples_per_engine

    def finished(self, engine: int, num_samples: int = 1) -> None:
        self._change(engine, -num_samples)
        assert self.owed[engine] >= 0, f"engine {engine} finished more samples than it was given"

    def _least_loaded(self) -> int | None:
        """Return the serving engine that owes least, the first of several; None where none serves."""
        for engine in [engine for engine in self._not_serving if self.serving[engine]]:
            self._not_serving.remove(engine)
            heappush(self._loads, (self.owed[engine], engine))
        while self._loads:
            load, engine = self._loads[0]
            if load == self.owed[engine] and self.serving[engine]:
                return engine
            heappop(self._loads)
            if not self.serving[engine]:
                self._not_serving.add(engine)
        return None

    def _change(self, engine: int, num_samples: int) -> None:
        was_idle = not self.owed[engine]
        self.owed[engine] += num_samples
        self._num_idle += (not self.owed[engine]) - was_idle
        heappush(self._loads, (self.owed[engine], engine))
        if len(self._loads) > 4 * len(self.owed):
            self._rebuild()

    def _rebuild(self) -> None:
        """Make the heap anew: while no group asks for an engine, entries that are no load any more pile up."""
        self._loads = [(owed, engine) for engine, owed in enumerate(self.owed)]
        heapify(self._loads)
        self._not_serving.clear()
