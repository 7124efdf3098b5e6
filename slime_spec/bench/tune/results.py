"""Results say what was measured at each batch size, on whatever engine; verdict, report and picture read them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from slime_spec.bench.tune.acceptance import Acceptance
from slime_spec.bench.tune.candidates import Candidate
from slime_spec.speculation.cost_table import CostTable

LEAST_REPETITIONS = 2  # or there is no uncertainty to state


@dataclass(frozen=True)
class Choice:
    """Says how a user chooses one side: its flags of train, and its number of drafts beside an engine that decides it.

    ``depth`` is None where the engine decides, and where nobody else would.
    Example: ``Choice(("--speculative-algorithm", "HISTORY"))``
    """

    flags: tuple[str, ...]
    depth: int | None = None


@dataclass(frozen=True)
class SpeedUp:
    """Holds each repetition's tokens per second over those of no speculation in the same repetition."""

    each: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.each)

    @property
    def text(self) -> str:
        """Return the median and the range: ``SpeedUp((1.3, 1.1, 1.2)).text == "1.20x (1.10 to 1.30)"``."""
        return f"{self.median:.2f}x ({min(self.each):.2f} to {max(self.each):.2f})"


@dataclass(frozen=True)
class Lengths:
    """Holds draft lengths for one draft at one batch: by RTP-LLM's formula, by measured costs, by measurement.

    ``rates`` are the draft's acceptance by position, by which lengths are predicted. ``break_even[d]`` is what a round
    of d drafts costs over a plain step. ``perfect`` is the most that drafts could
    bring which are all accepted. ``measured`` is the fastest fixed length that took turns, 0 for none.
    """

    draft: str
    context: int
    rates: tuple[float, ...]
    step_share: float
    by_formula: int
    by_costs: int
    predicted: float
    break_even: Mapping[int, float]
    perfect: float
    measured: int | None = None


@dataclass(frozen=True)
class Rounds:
    """Holds what rounds of one side brought and cost at one batch, of an engine whose passes nobody here can time.

    ``accept_length`` are the tokens of a round and a sequence, the bonus token included; ``break_even`` is how many
    plain steps a round took, each None where the server's counters do not give it. ``most`` is what a round brings
    whose drafts are all accepted.
    Example: ``Rounds(accept_length=2.1, break_even=1.4, most=4)`` is 1.5 times as fast as no speculation.
    """

    accept_length: float | None
    break_even: float | None
    most: int


@dataclass(frozen=True)
class BatchResult:
    """Holds the sides that took turns at one batch, by name, and the predicted speed-ups of those that did not.

    ``rounds`` are of the sides whose engine reports nothing finer. ``assumed`` are (accept length, best draft length,
    speed-up) of drafts that nobody has: by measured costs alone.
    """

    batch: int
    off_tokens_per_s: float
    sides: Mapping[str, Choice]
    speed_ups: Mapping[str, SpeedUp]
    predicted: Mapping[str, float]
    lengths: Lengths | None
    assumed: tuple[tuple[float, int, float], ...] = ()
    rounds: Mapping[str, Rounds] = field(default_factory=dict)

    @property
    def fastest(self) -> str | None:
        """Return the fastest side; None where off alone took turns."""
        return max(self.speed_ups, key=lambda name: self.speed_ups[name].median, default=None)


@dataclass(frozen=True)
class Swept:
    """Holds the sweep of one engine: ``notes`` are sentences that a reader of its numbers must know.

    ``left_out`` says of each side that was not measured why it was not. ``assumed_at`` names the costs behind
    BatchResult.assumed, ``best`` the draft with weights that must outlive a push, None where there is none. ``costs``
    are those of an engine that times its passes.
    """

    acceptance: tuple[Acceptance, ...]
    batches: tuple[BatchResult, ...]
    assumed_at: str
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    best: Candidate | None = None
    costs: CostTable | None = None
