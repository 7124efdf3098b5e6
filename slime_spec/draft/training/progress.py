"""Long work reports its progress through this Protocol."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """``show("training", 30, 1000, "loss 2.10")``: a phase, its progress, and a note."""

    def show(self, phase: str, done: int, wanted: int, note: str = "") -> None: ...
