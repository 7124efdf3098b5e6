"""The alarm warns of a draft that is never accepted: it costs time, and no output shows it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from slime_spec.algorithms import Algorithm
from slime_spec.config.tree import Config

logger = logging.getLogger(__name__)

SILENT_ROUNDS = 200  # rounds with drafts of which none was accepted: the accept length is exactly 1.00


class AcceptanceAlarm:
    """Implements MetricSink: warns once, when no draft was accepted in SILENT_ROUNDS rounds that had one."""

    def __init__(self, algorithm: Algorithm) -> None:
        self._algorithm = algorithm
        self._silent_rounds = 0
        self._has_warned = False

    @classmethod
    def open(cls, config: Config, folder: Path) -> AcceptanceAlarm:
        return cls(config.speculative.record)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        num_rounds = values.get("spec/verify_rounds", 0.0) - values.get("spec/empty_rounds", 0.0)
        self.see(int(num_rounds), int(values.get("spec/correct_drafts", 0.0)), f"step={step}")

    def see(self, num_rounds: int, num_correct: int, when: str) -> None:
        """Count rounds that had a draft and the drafts accepted in them; the warning names ``when``."""
        if num_correct:
            self._silent_rounds = 0
            return
        self._silent_rounds += num_rounds
        if self._silent_rounds >= SILENT_ROUNDS and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "accept length is exactly 1.00: no draft was accepted rounds=%d %s algorithm=%s likely_causes=%r",
                self._silent_rounds,
                when,
                self._algorithm.name,
                self._algorithm.likely_causes,
            )

    def close(self) -> None:
        pass
