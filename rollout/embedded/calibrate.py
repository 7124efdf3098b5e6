"""Calibration times a handful of rounds over scratch rows, before the first request, for the costs of rounds."""

from __future__ import annotations

from rollout.embedded.core import GenerationCore
from rollout.embedded.draft import Draft
from rollout.embedded.plan import RowSpan
from rollout.embedded.uniforms import Uniforms
from rollout.embedded.verification.verifier import VerifyRow
from slime_spec.speculation.cost_table import TABLE_BATCHES, TABLE_CONTEXTS, CostTable, cost_table
from slime_spec.speculation.round_costs import PassCurve, RoundCosts
from slime_spec.types import SamplingParams

# Close together where passes are nearly free and where that ends, and where a batch without drafts never tells what
# one with drafts would cost: a disturbed point there is never corrected. Larger ones bound each from above.
ROW_COUNTS = (1, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 32, 64, 128)
MOST_SECONDS = 1.5  # what larger row counts cost is continued from the smaller ones
NUM_TIMES = 3
SMALL_ROWS = 16  # passes over more rows are timed once: they last longer than most disturbances
LONG_CONTEXT = 256


def calibrate(core: GenerationCore) -> None:
    """Measure what rounds of ``core`` cost, where it speculates; takes MOST_SECONDS or so, or the time of one pass."""
    if core.settings.speculates:
        core.speculation.use_costs(_measured(core), core.settings.is_automatic, core.settings.max_running)


def costs_of(core: GenerationCore) -> CostTable | None:
    """Return the table of what rounds of ``core`` cost by what it knows now; None where it does not speculate."""
    if core.speculation.costs is None:
        return None
    most, longest = core.settings.max_running, core.settings.max_positions
    batches = [batch for batch in TABLE_BATCHES if batch < most] + [most]
    contexts = [context for context in TABLE_CONTEXTS if context < longest] or [longest // 2]
    return cost_table(core.speculation.costs, core.speculation.has_network, batches, contexts)


def _measured(core: GenerationCore) -> RoundCosts:
    passes, clock = _Passes(core), core.cost_clock
    passes.seconds(1, 0)  # what the first pass does once is not its cost
    points: list[tuple[int, float]] = []
    start = clock()
    for rows in ROW_COUNTS:
        if passes.fits(rows, 0) and (not points or clock() - start < MOST_SECONDS):
            num_times = NUM_TIMES if rows <= SMALL_ROWS else 1
            points.append((rows, min(passes.seconds(rows, 0) for _ in range(num_times))))
    attend_s = 0.0
    rows = max(rows for rows, _ in points if rows <= SMALL_ROWS // 2)
    if passes.fits(rows, LONG_CONTEXT) and clock() - start < MOST_SECONDS:
        near, far = (min(passes.seconds(rows, context) for _ in range(NUM_TIMES)) for context in (0, LONG_CONTEXT))
        attend_s = max(0.0, far - near) / (rows * LONG_CONTEXT)
    passes.end()
    return RoundCosts(PassCurve(points), attend_s)


class _Passes:
    """Runs passes over rows that no sequence owns, and judges drafts of them, as a round does."""

    def __init__(self, core: GenerationCore) -> None:
        assert not core.has_work, "scratch rows are no sequence's"
        self._core, self._max_running = core, core.settings.max_running
        self._max_positions = min(core.settings.max_positions, core.cache.max_total_tokens)
        self._caches = [core.cache] if core.drafter.cache is None else [core.cache, core.drafter.cache]

    def _shape(self, rows: int) -> tuple[int, int]:
        """Return how many sequences have how many tokens each, together about ``rows``."""
        sequences = min(rows, self._max_running)
        return sequences, rows // sequences

    def fits(self, rows: int, context: int) -> bool:
        sequences, count = self._shape(rows)
        needed = (sequences, context + count)
        return needed[1] <= self._max_positions and self._caches[0].fits(needed, (0, 0))

    def seconds(self, rows: int, context: int) -> float:
        """Return the time of one pass of so many rows, after ``context`` positions."""
        sequences, count = self._shape(rows)
        core, (cache, *followers) = self._core, self._caches
        cache.reserve((sequences, context + count), (0, 0))
        for follower in followers:
            follower.follow(cache)
        spans = [RowSpan(row, context, count) for row in range(sequences)]
        start = core.cost_clock()
        output = core.target.run(cache.own, spans, [0] * (sequences * count))
        draft, params = Draft.chain([0] * (count - 1)), SamplingParams(max_new_tokens=count)
        rows_of_pass = [VerifyRow(draft, params, Uniforms(row, count), [0], 1) for row in range(sequences)]
        core.verifier(core.target.logits(output.hidden), rows_of_pass)  # reads its results: a device is waited for
        return core.cost_clock() - start

    def end(self) -> None:
        """Give the scratch rows back."""
        for cache in self._caches:
            cache.release()
