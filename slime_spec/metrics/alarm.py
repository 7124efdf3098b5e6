"""The alarm warns of a draft that is never accepted or has no finite logits: it costs time, and no output shows it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from slime_spec.algorithms import NONE, Algorithm
from slime_spec.config.tree import Config

logger = logging.getLogger(__name__)

SILENT_ROUNDS = 200  # rounds with drafts of which none was accepted: the accept length is exactly 1.00
NONFINITE_ROUNDS = 200  # rounds whose draft was cut short because the draft's logits were not finite numbers


class AcceptanceAlarm:
    """Implements MetricSink: warns once of each, a draft that is never accepted and a draft without finite logits."""

    def __init__(self, algorithm: Algorithm) -> None:
        self._algorithm = algorithm
        self._silent_rounds = self._nonfinite_rounds = 0
        self._has_warned = self._has_warned_of_nonfinite = False

    @classmethod
    def open(cls, config: Config, folder: Path) -> AcceptanceAlarm:
        return cls(config.speculative.record)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        num_rounds = values.get("spec/verify_rounds", 0.0) - values.get("spec/empty_rounds", 0.0)
        num_nonfinite = int(values.get("spec/nonfinite_rounds", 0.0))
        self.see(int(num_rounds), int(values.get("spec/correct_drafts", 0.0)), f"step={step}", num_nonfinite)

    def see(self, num_rounds: int, num_correct: int, when: str, num_nonfinite: int = 0) -> None:
        """Count rounds that had a draft, drafts accepted in them, and nonfinite rounds; warnings name ``when``."""
        self._see_nonfinite(num_nonfinite, when)
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

    def _see_nonfinite(self, num_rounds: int, when: str) -> None:
        self._nonfinite_rounds += num_rounds
        if self._nonfinite_rounds >= NONFINITE_ROUNDS and not self._has_warned_of_nonfinite:
            self._has_warned_of_nonfinite = True
            logger.warning(
                "the draft's logits are not finite numbers: its drafts are cut short or empty, the output stays exact "
                "rounds=%d %s algorithm=%s remedy=%r",
                self._nonfinite_rounds,
                when,
                self._algorithm.name,
                "look for overflow or damage in the draft's weights; serve it in bfloat16 or float32 (--sglang-dtype); "
                f"or decode without it (--speculative-algorithm {NONE.name})",
            )

    def close(self) -> None:
        pass
