"""The sweep lets sides take turns at each batch size, and says what each brings over no speculation."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

from rollout.embedded.calibrate import costs_of
from slime_spec.algorithms import CONTROLLED_CHAIN
from slime_spec.bench.pays.sides import drawn_order
from slime_spec.bench.timing import Clock, tell
from slime_spec.bench.tune.acceptance import Acceptance, measure_acceptance
from slime_spec.bench.tune.candidates import Candidate, by_rule, configured, text_candidates
from slime_spec.bench.tune.options import TuneOptions
from slime_spec.bench.tune.results import LEAST_REPETITIONS, BatchResult, Choice, Lengths, SpeedUp, Swept
from slime_spec.bench.tune.sides import Cores, Side
from slime_spec.bench.tune.workload import Workload
from slime_spec.speculation.cost_table import break_even_length
from slime_spec.speculation.draft_length import length_by_costs, length_by_step_share, rate_of_length, speed_up
from slime_spec.speculation.round_costs import RoundCosts

WORTH_MEASURING = 0.85  # of what is predicted; the rest is told as predicted
SHORT, LONG = (1, 3), 7
Of = Mapping[Candidate, Acceptance]


def sweep_cores(options: TuneOptions, drafts: Sequence[Candidate], workload: Workload) -> Swept:
    """Measure acceptance, then every batch, on cores of this process, which end with it."""
    config, sizes = options.config, options.batch_sizes
    cores = Cores(config, max(sizes))
    has_texts = workload.has_earlier or (workload.num_samples > 1 and max(sizes) > 1)
    candidates = text_candidates(has_texts) + [rule for draft in drafts for rule in by_rule(draft, config)]
    acceptance = dict(zip(candidates, measure_acceptance(cores, candidates, workload), strict=True))
    context = typical_context(workload)
    of = _best_rules(cores, acceptance, sizes[0], context)
    own = configured(config)
    plan = Plan(
        of=of,
        others=() if own is None else (cores.side(own),),
        num_repetitions=options.num_rounds,
        seconds=options.seconds / len(sizes),
        assumed_lengths=options.assumed_lengths,
    )
    batches = tuple(measure_batch(cores, plan, workload, size, perf_counter) for size in sizes)
    best = leading(cores, of, sizes[0], context)
    return Swept(
        acceptance=tuple(acceptance.values()),
        batches=batches,
        assumed_at="no cost of drafting: a bound" if best is None else "this draft's measured costs",
        best=best,
        costs=costs_of(cores.side((best or next(iter(of))).alone).core),
    )


def _best_rules(
    cores: Cores, acceptance: dict[Candidate, Acceptance], batch: int, context: int
) -> dict[Candidate, Acceptance]:
    """Keep each draft with its best rule of verification alone, and give the others' cores up."""
    names: dict[str, list[Candidate]] = {}
    for candidate in acceptance:
        names.setdefault(candidate.name, []).append(candidate)
    kept = {}
    for group in names.values():
        best = (
            group[0] if len(group) == 1 else leading(cores, {each: acceptance[each] for each in group}, batch, context)
        )
        assert best is not None, "only a network's drafts have several rules"
        kept[best] = acceptance[best]
        for other in group:
            if other is not best:
                cores.drop(other.alone)
    return kept


def text_speed_up(costs: RoundCosts, found: Acceptance, batch: int, context: int) -> float:
    """Return what a text's drafts bring by its acceptance and drafts a step; finding them counts as free."""
    assert found.gained is not None and found.drafted is not None, "the embedded engine counts its drafts"  # noqa: PT018
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
    choices = {name: Choice(side.candidate.flags(side.depth), side.depth) for name, side in by_name.items()}
    return BatchResult(batch, statistics.median(off), choices, speed_ups, predicted, lengths, assumed)


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
