"""The alarm of a draft that is never right: speculation that costs time, changes no output, and says nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from slime_spec.config.tree import Config

logger = logging.getLogger(__name__)

SILENT_ROUNDS = 200  # with a draft, and none of it accepted: the accept length is exactly 1.00
LIKELY_CAUSES: Mapping[str, str] = {
    "STANDALONE": "a draft model of another tokenizer with as many tokens; a damaged checkpoint",
    "EAGLE": "another target's draft; hidden states from before the final norm; a draft as old as an earlier target",
    "EAGLE3": (
        "a draft lm_head that is not in its file; d2t of the other convention (offset or absolute); captured layer ids "
        "that are not the ones it was trained on; another target's draft; a draft as old as an earlier target"
    ),
    "NEXTN": (
        "the halves of its projection in the wrong order (hidden state, embedding); an MTP layer that the trainer "
        "neither trains nor pushes"
    ),
    "DFLASH": "another target's draft; a draft as old as an earlier target",
    "DSPARK": "another target's draft; a draft as old as an earlier target",
    "LOOKUP": "replies that do not repeat their prompt or advice; advice for another prompt",
    "NGRAM": "replies that resemble neither each other nor the corpus",
}


class AcceptanceAlarm:
    """Implements MetricSink: warns once, when no draft was accepted in SILENT_ROUNDS rounds that had one."""

    def __init__(self, algorithm: str) -> None:
        self._algorithm = algorithm
        self._silent_rounds = 0
        self._has_warned = False

    @classmethod
    def open(cls, config: Config, folder: Path) -> AcceptanceAlarm:
        return cls(config.speculative.algorithm)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        num_rounds = values.get("spec/verify_rounds", 0.0) - values.get("spec/empty_rounds", 0.0)
        self.see(int(num_rounds), int(values.get("spec/correct_drafts", 0.0)), f"step={step}")

    def see(self, num_rounds: int, num_correct: int, when: str) -> None:
        """Rounds that had a draft, and the drafts accepted in them; ``when`` is for the warning."""
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
                self._algorithm,
                LIKELY_CAUSES[self._algorithm],
            )

    def close(self) -> None:
        pass
