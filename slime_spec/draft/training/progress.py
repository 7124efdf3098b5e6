"""What long work tells whoever waits for it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """``show("training", 30, 1000, "loss 2.10")``: a phase, how far it is, and what to say beside it."""

    def show(self, phase: str, done: int, wanted: int, note: str = "") -> None: ...
