"""Long work reports its progress through this Protocol."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Shows a phase, its progress, and a note: ``show("training", 30, 1000, "loss 2.10")``."""

    def show(self, phase: str, done: int, wanted: int, note: str = "") -> None: ...
