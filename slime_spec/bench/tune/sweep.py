"""The sweep lets sides take turns at each batch size, and says what each brings over no speculation."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from slime_spec.algorithms import CONTROLLED_CHAIN
from slime_spec.bench.pays.sides import drawn_order
from slime_spec.bench.timing import Clock, tell
from slime_spec.bench.tune.acceptance import Acceptance
from slime_spec.bench.tune.candidates import Candidate
from slime_spec.bench.tune.sides import Cores, Side
from slime_spec.bench.tune.workload import Workload
from slime_spec.speculation.cost_table import break_even_length
from slime_spec.speculation.draft_length import length_by_costs, length_by_step_share, rate_of_length, speed_up
from slime_spec.speculation.round_costs import RoundCosts

LEAST_REPETITIONS = 2  # or there is no uncertainty to state
WORTH_MEASURING = 0.85  # of what is predicted; the rest is told as predicted
SHORT, LONG = (1, 3), 7
Of = Mapping[Candidate, Acceptance]


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
class BatchResult:
    """Holds the sides that took turns at one batch, by name, and the predicted speed-ups of those that did not.

    ``assumed`` are (accept length, best draft length, speed-up) of drafts that nobody has: by measured costs alone.
    """

    batch: int
    off_tokens_per_s: float
    sides: Mapping[str, Side]
    speed_ups: Mapping[str, SpeedUp]
    predicted: Mapping[str, float]
    lengths: Lengths | None
    assumed: tuple[tuple[float, int, float], ...] = ()

    @property
    def fastest(self) -> str | None:
        """Return the fastest side; None where off alone took turns."""
        return max(self.speed_ups, key=lambda name: self.speed_ups[name].median, default=None)


def text_speed_up(costs: RoundCosts, found: Acceptance, batch: int, context: int) -> float:
    """Return what a text's drafts bring by its acceptance and drafts a step; finding them counts as free."""
    rows = round(batch * (1.0 + found.drafted))
    plain_s, seconds = (costs.pass_s(count, count * context) for count in (batch, rows))
    return (1.0 + found.gained) * plain_s / seconds


def lengths_of(side: Side, found: Acceptance, batch: int, context: int) -> Lengths:
    """Return the draft lengths of a network at one batch, from its acceptance and its core's costs."""
    costs, most = side.costs, len(found.rates)
    step_share = costs.draft_s(batch, 1) / costs.pass_s(batch, batch * context)
    best, predicted = length_by_costs(costs, found.rates, batch, context)
    perfect = max(speed_up(costs, [1.0] * most, batch, context, depth) for depth in range(most + 1))
    break_even = {depth: break_even_length(costs, batch, context, depth) for depth in range(1, most + 1)}
    by_formula = length_by_step_share(found.rates, step_share)
    return Lengths(found.name, context, found.rates, step_share, by_formula, best, predicted, break_even, perfect)


def leading(cores: Cores, of: Of, batch: int, context: int) -> Candidate | None:
    """Return the network's draft, and its rule, of the greatest predicted speed-up; None without a network."""
    networks = [each for each in of if each.has_network]

    def predicted(candidate: Candidate) -> float:
        return length_by_costs(cores.side(candidate.alone).costs, of[candidate].rates, batch, context)[1]

    return max(networks, key=predicted, default=None)


def chosen_sides(cores: Cores, of: Of, batch: int, context: int) -> tuple[list[Side], dict[str, float], Lengths | None]:
    """Return the sides that take turns, the predicted speed-ups of those that do not, and the leading draft's lengths.

    Every network's draft takes turns with the engine deciding; of the leading one fixed lengths too, where they may
    pay.
    """
    sides, predicted = [cores.off()], dict[str, float]()
    best = leading(cores, of, batch, context)
    for candidate, found in of.items():
        side = cores.side(candidate)
        expected = WORTH_MEASURING
        if not candidate.has_network:
            expected = text_speed_up(side.costs, found, batch, context)
        if expected >= WORTH_MEASURING:
            sides.append(side)
        else:
            predicted[side.name] = expected
    if best is None:
        return sides, predicted, None
    side, found = cores.side(best.alone), of[best]
    lengths = lengths_of(side, found, batch, context)
    wanted = {*SHORT, lengths.by_formula, lengths.by_costs, *([LONG] if batch == 1 else [])}
    for depth in sorted(each for each in wanted if 0 < each <= len(found.rates)):
        fixed = cores.side(best.alone, depth)
        expected = speed_up(side.costs, found.rates, batch, context, depth)
        if expected >= WORTH_MEASURING:
            sides.append(fixed)
        else:
            predicted[fixed.name] = expected
    return sides, predicted, lengths


@dataclass(frozen=True)
class Plan:
    """Holds what is measured: the drafters with their acceptance, further sides, and for how long.

    ``seconds`` are of one batch: after LEAST_REPETITIONS no repetition begins once they are over.
    """

    of: Of
    others: tuple[Side, ...]
    num_repetitions: int
    seconds: float
    assumed_lengths: tuple[float, ...] = ()


def measure_batch(cores: Cores, plan: Plan, workload: Workload, batch: int, clock: Clock) -> BatchResult:
    """Let the sides take turns at one batch size."""
    context = typical_context(workload)
    sides, predicted, lengths = chosen_sides(cores, plan.of, batch, context)
    by_name = {side.name: side for side in (*sides, *plan.others)}
    rates = _rates(cores, by_name, workload, batch, plan, clock)
    off = rates.pop(cores.off().name)
    speed_ups = {
        name: SpeedUp(tuple(rate / plain for rate, plain in zip(each, off, strict=True)))
        for name, each in rates.items()
    }
    if lengths is not None:
        lengths = _with_measured(lengths, by_name, speed_ups)
    assumed = assumed_speed_ups(cores, plan, batch, context)
    return BatchResult(batch, statistics.median(off), by_name, speed_ups, predicted, lengths, assumed)


def _rates(
    cores: Cores, sides: Mapping[str, Side], workload: Workload, batch: int, plan: Plan, clock: Clock
) -> dict[str, list[float]]:
    """Return each side's tokens per second, repetition by repetition."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    start = clock()
    for repetition in range(plan.num_repetitions):
        if repetition >= LEAST_REPETITIONS and clock() - start >= plan.seconds:
            break
        tell(f"{batch} at once, {len(sides)} sides: repetition {repetition + 1} of {plan.num_repetitions}")
        gc.collect()  # not while a side is timed
        for name in drawn_order(list(sides), workload.seed, repetition):
            one = cores.timed(sides[name], workload.waves(batch, repetition))
            rates[name].append(one.result.num_tokens / cores.seconds(one))
    return rates


def assumed_speed_ups(cores: Cores, plan: Plan, batch: int, context: int) -> tuple[tuple[float, int, float], ...]:
    """Return what drafts of the assumed accept lengths would bring at the costs of the leading draft.

    The rate is the same at every position, such that the longest chain brings the length. Without a network drafts
    count as free, which bounds what any draft would bring.
    """
    best = leading(cores, plan.of, batch, context)
    side = cores.side((best or next(iter(plan.of))).alone)
    costs = side.costs if best else side.costs.with_free_drafts()
    depth = CONTROLLED_CHAIN[0]
    found = (
        (length, length_by_costs(costs, [rate_of_length(length, depth)] * depth, batch, context))
        for length in plan.assumed_lengths
    )
    return tuple((length, best_depth, gain) for length, (best_depth, gain) in found)


def typical_context(workload: Workload) -> int:
    """Return the tokens that a sequence attends to in the middle of a reply."""
    prompts = [len(prompt.token_ids) for prompt in workload.prompts]
    return round(statistics.median(prompts)) + workload.params.max_new_tokens // 2


def _with_measured(lengths: Lengths, sides: Mapping[str, Side], speed_ups: Mapping[str, SpeedUp]) -> Lengths:
    """Note the fastest of the fixed lengths, off among them; None where none took a turn."""
    fixed: Sequence[tuple[float, int]] = [
        (speed_ups[name].median, side.depth) for name, side in sides.items() if side.depth is not None
    ]
    return replace(lengths, measured=max([(1.0, 0), *fixed])[1]) if fixed else lengths
