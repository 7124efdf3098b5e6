"""Members are the engines' actors, and those that are made in the same bundles in place of ones that died."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from time import monotonic
from typing import Any

from rollout.actor import EngineActors, create_engine_actors
from slime_spec.config.tree import Config
from slime_spec.placement import Placement
from slime_spec.types import EngineStats, SpecCounters

HOUR_S = 3600.0
LEAST_PER_HOUR = 6


class Members:
    """Keeps each engine's actors, and its counts over all the processes that it has had.

    So many are made again within an hour as the configuration says, by default each once, and at least six.
    """

    def __init__(self, config: Config, placement: Placement, now: Callable[[], float] = monotonic) -> None:
        self._config, self._placement, self._now = config, placement, now
        asked = config.rollout.max_engine_restarts_per_hour
        self._num_per_hour = max(LEAST_PER_HOUR, config.rollout.num_engines) if asked is None else asked
        self._made_at: deque[float] = deque()
        self._actors = [self._create(engine) for engine in range(config.rollout.num_engines)]
        self._earlier: dict[int, EngineStats] = {}  # what processes that are no more had counted
        self._last: dict[int, EngineStats] = {}

    def __len__(self) -> int:
        return len(self._actors)

    def engine(self, engine: int) -> Any:
        return self._actors[engine].engine

    def may_make(self) -> bool:
        """Return whether one more engine may be made again now."""
        while self._made_at and self._now() - self._made_at[0] >= HOUR_S:
            self._made_at.popleft()
        return len(self._made_at) < self._num_per_hour

    def make(self, engine: int) -> None:
        """End what is left of an engine's processes and create its actors again, which ``start`` is to be called of.

        Ray's own restarts do not do: an actor that Ray has restarted answers before it is started, with version 0.
        """
        self._made_at.append(self._now())
        self._actors[engine].kill()
        last = self._last.pop(engine, None) or self._earlier.get(engine)
        if last is not None:
            self._earlier[engine] = replace(last, num_restarts=last.num_restarts + 1)
        self._actors[engine] = self._create(engine)

    def stats_of(self, engine: int, now: EngineStats | None) -> EngineStats:
        """Return stats with the sums of the engine's earlier processes; of one that is dead (``now`` None) the last."""
        if now is not None:
            earlier = self._earlier.get(engine)
            self._last[engine] = now if earlier is None else after(earlier, now)
            return self._last[engine]
        last = self._last.get(engine) or self._earlier[engine]
        return replace(last, num_running=0, num_waiting=0, speculates=False, canary=SpecCounters())

    def stop(self) -> None:
        """Kill every actor."""
        for actors in self._actors:
            actors.kill()

    def _create(self, engine: int) -> EngineActors:
        return create_engine_actors(self._config, engine, self._placement)


def after(earlier: EngineStats, now: EngineStats) -> EngineStats:
    """Return ``now`` with its sums continued from those of the process before."""
    return replace(
        now,
        time_in_forward_s=earlier.time_in_forward_s + now.time_in_forward_s,
        time_total_s=earlier.time_total_s + now.time_total_s,
        time_in_draft_s=earlier.time_in_draft_s + now.time_in_draft_s,
        num_preemptions=earlier.num_preemptions + now.num_preemptions,
        num_restarts=earlier.num_restarts + now.num_restarts,
        num_draft_resends=earlier.num_draft_resends + now.num_draft_resends,
        num_interruptions=earlier.num_interruptions + now.num_interruptions,
        benefit=earlier.benefit.plus(now.benefit),
    )
