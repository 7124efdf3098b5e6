"""Graphs are captured once for each shape of a pass and replayed from then on: one launch instead of hundreds.

A graph reads and writes fixed addresses. What it was captured over (weights, heads) is its owners; another owner, or
one whose memory has moved, makes it anew.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

# What a captured run returns: its tensors are written anew by every replay
Outputs = Any


@dataclass(frozen=True)
class Captured:
    """Holds what runs a captured pass again, and where the pass puts its results."""

    replay: Callable[[], None]
    outputs: Outputs


class Capturer(Protocol):
    """Captures what a function launches on a device."""

    def capture(self, run: Callable[[], Outputs]) -> Captured:
        """Return ``run`` captured; ``run`` reads its inputs from tensors that stay, and does not read the device."""


class CudaCapturer:
    """Captures CUDA graphs that share one pool of memory: they never run beside each other."""

    def __init__(self) -> None:
        self._pool: Any = None

    def capture(self, run: Callable[[], Outputs]) -> Captured:
        if self._pool is None:
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
        return Captured(graph.replay, outputs)


class Graphs:
    """Keeps a captured graph for each key."""

    def __init__(self, capturer: Capturer) -> None:
        self._capturer = capturer
        self._captured: dict[Hashable, tuple[tuple[object, ...], Captured]] = {}

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, key: Hashable, owners: tuple[object, ...], run: Callable[[], Outputs]) -> Outputs:
        """Run ``run``, captured before under ``key`` and over the same owners, and return its outputs."""
        known = self._captured.get(key)
        if (
            known is None
            or len(known[0]) != len(owners)
            or any(a is not b for a, b in zip(known[0], owners, strict=True))
        ):
            self._captured.pop(key, None)  # its memory is free before the next one's is taken
            known = self._captured[key] = owners, self._capturer.capture(run)
        known[1].replay()
        return known[1].outputs

    def clear(self) -> None:
        """Forget all graphs, whose memory is given back."""
        self._captured.clear()
