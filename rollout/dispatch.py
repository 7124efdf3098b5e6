"""The dispatcher chooses the engine of the next group: the least loaded engine that serves and has room."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Dispatcher:
    """Counts the samples that each engine still owes; an engine has room for ``samples_per_engine`` samples.

    Room is a little more than an engine decodes at once, so that its queue never runs dry while late groups can still
    go to whichever engine frees up first. ``serving`` says which engines serve now; its owner changes it.
    """

    serving: list[bool]
    samples_per_engine: int
    owed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.owed = [0] * len(self.serving)

    def assign(self, num_samples: int) -> int | None:
        """Reserve the least loaded engine for a group; None when all serving engines are full. An idle one never is."""
        serving = [engine for engine, serves in enumerate(self.serving) if serves]
        if not serving:
            return None
        engine = min(serving, key=self.owed.__getitem__)
        if self.owed[engine] and self.owed[engine] + num_samples > self.samples_per_engine:
            return None
        self.owed[engine] += num_samples
        return engine

    def finished(self, engine: int, num_samples: int = 1) -> None:
        self.owed[engine] -= num_samples
        assert self.owed[engine] >= 0, f"engine {engine} finished more samples than it was given"
