"""Graphs are captured once for each shape of a pass and replayed from then on: one launch instead of hundreds.

A graph reads and writes fixed addresses. What it was captured over (weights, heads) is its owners, which it does not
keep alive: another owner, or one whose memory has moved, makes it anew, and graphs of owners that are gone are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from operator import is_
from typing import Any, Protocol
from weakref import WeakSet, ref

import torch

# What a captured run returns: its tensors are written anew by every replay
Outputs = Any


@dataclass(frozen=True, eq=False)
class Captured:
    """Holds what runs a captured pass again, and where the pass puts its results."""

    replay: Callable[[], None]
    outputs: Outputs


class Capturer(Protocol):
    """Captures what a function launches on a device."""

    def capture(self, run: Callable[[], Outputs]) -> Captured:
        """Return ``run`` captured; ``run`` reads its inputs from tensors that stay, and does not read the device."""


class CudaCapturer:
    """Captures CUDA graphs that share one pool of memory: they never run beside each other.

    A replay may write over the results of any other graph, so they are read or copied before another graph runs.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._alive: WeakSet[Captured] = WeakSet()

    def capture(self, run: Callable[[], Outputs]) -> Captured:
        if not self._alive:  # torch lets no graph join a pool that the last one has left
            self._pool = torch.cuda.graph_pool_handle()
        # Once without capturing, beside the main stream: kernels are compiled and libraries take their workspaces.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads of this process may use the device meanwhile: a push arrives while the engine serves.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = run()
        captured = Captured(graph.replay, outputs)
        self._alive.add(captured)
        return captured


@dataclass(frozen=True)
class Kept:
    """Holds a graph and its owners: references that die with them, None for what has no owner."""

    captured: Captured
    owners: tuple[ref[Any] | None, ...]

    @property
    def is_alive(self) -> bool:
        return all(owner is None or owner() is not None for owner in self.owners)

    def is_over(self, owners: tuple[object, ...]) -> bool:
        mine = [None if owner is None else owner() for owner in self.owners]
        return self.is_alive and len(mine) == len(owners) and all(map(is_, mine, owners))


class Graphs:
    """Keeps a captured graph for each key."""

    def __init__(self, capturer: Capturer) -> None:
        self._capturer = capturer
        self._kept: dict[Hashable, Kept] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def run(self, key: Hashable, owners: tuple[object, ...], run: Callable[[], Outputs]) -> Outputs:
        """Run ``run``, captured before under ``key`` and over the same owners, and return its outputs."""
        if key not in self._kept or not self._kept[key].is_over(owners):
            # Theirs is free before the next one's memory is taken.
            self._kept = {other: kept for other, kept in self._kept.items() if other != key and kept.is_alive}
            references = tuple(None if owner is None else ref(owner) for owner in owners)
            self._kept[key] = Kept(self._capturer.capture(run), references)
        captured = self._kept[key].captured
        captured.replay()
        return captured.outputs

    def clear(self) -> None:
        """Forget all graphs, whose memory is given back."""
        self._kept.clear()
