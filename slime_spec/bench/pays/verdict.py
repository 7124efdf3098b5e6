"""Rows say what the repetitions of a scenario show: each side's speed over off, by CPU time, and what is promised."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from slime_spec.algorithms import HISTORY
from slime_spec.bench.eagle3 import ON_CPU
from slime_spec.bench.pays.sides import AUTO, AUTOMATIC, FROM_HISTORY, OFF, PERFECT, Result, Times
from slime_spec.bench.race import maybe_at_least
from slime_spec.bench.rows import Row, at_least
from slime_spec.bench.timing import Timed

LEAST = 0.98  # of every repetition on a quiet machine, and against the best fixed setting
WORDS = {
    OFF: "no speculation",
    AUTO: "EAGLE-3, automatic depth",
    FROM_HISTORY: f"{HISTORY.name}, automatic depth",
    PERFECT: "the reply itself as its draft",
}


@dataclass(frozen=True)
class Where:
    """Names the rows of a scenario: ``Where("untrained", "64_tail").prefix == "pays.untrained.64_tail"``."""

    policy: str
    scenario: str
    rule: str = "target_only"

    @property
    def prefix(self) -> str:
        rule = "" if self.rule == "target_only" else f".{self.rule}"
        return f"pays.{self.policy}{rule}.{self.scenario}"

    @property
    def words(self) -> str:
        return f"{self.scenario} at once, {self.policy} policy, {self.rule}"


def rows_of(where: Where, times: Times, pays_up_to: Mapping[str, int | None], bound: float | None) -> list[Row]:
    """Return a scenario's rows; ``bound`` is that of automatic EAGLE-3 over off."""
    rates = {name: [each.result.num_tokens / each.cpu_s for each in times[name]] for name in times}
    rows = [_speed(where, name, rates[name]) for name in times]
    for name in (name for name in times if name != OFF):
        ratios = over(rates[name], rates[OFF])
        text = f"{words(name)} over none, {where.words}, tokens per CPU second; each {listed(ratios)}"
        rows.append(
            maybe_at_least(
                f"{where.prefix}.{name}.speedup", text, statistics.median(ratios), bound if name == AUTO else None
            )
        )
        if name in AUTOMATIC:
            text = f"{words(name)} over none, {where.words}: the least repetition"
            rows.append(at_least(f"{where.prefix}.{name}.least", text, min(ratios), "x", LEAST))
    rows.append(_over_best_fixed(where, rates))
    for name in AUTOMATIC:
        rows += _own_estimate(where, name, times[name], over(rates[name], rates[OFF]))
        rows += _choices(where, name, times[name], pays_up_to[name])
    return [*rows, _same_replies(where, times)]


def words(name: str) -> str:
    """Return a side's name for a reader: ``words("depth3") == "EAGLE-3, depth 3"``."""
    return WORDS.get(name) or f"EAGLE-3, depth {name.removeprefix('depth')}"


def over(rates: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return each repetition's ratio: both sides of a repetition meet the same disturbances of the machine."""
    return [rate / other for rate, other in zip(rates, others, strict=True)]


def listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def _speed(where: Where, name: str, rates: Sequence[float]) -> Row:
    id = f"{where.prefix}.{name}.tokens_per_cpu_s"
    return Row(id, f"{words(name)}, {where.words}, prefill included", statistics.median(rates), "tokens/CPU-s")


def _over_best_fixed(where: Where, rates: Mapping[str, Sequence[float]]) -> Row:
    """Hold the automatic depth to the setting that was fastest here, off included, which nobody knows beforehand."""
    fixed = [name for name in rates if name not in (*AUTOMATIC, PERFECT)]
    best = max(fixed, key=lambda name: statistics.median(rates[name]))
    ratios = over(rates[AUTO], rates[best])
    text = f"{words(AUTO)} over the best fixed setting, {words(best)}, {where.words}; each {listed(ratios)}"
    return at_least(f"{where.prefix}.{AUTO}.over_best_fixed", text, statistics.median(ratios), "x", LEAST)


def _own_estimate(where: Where, name: str, times: Sequence[Timed[Result]], measured: Sequence[float]) -> list[Row]:
    """Return the engine's estimate, which leaves the prefill out, and what it is off by with the prefill put in."""
    benefits = [each.result.benefit for each in times]
    rounds = [each.plain_s / each.spent_s for each in benefits]
    whole = [
        (each.cpu_s - benefit.spent_s + benefit.plain_s) / each.cpu_s
        for each, benefit in zip(times, benefits, strict=True)
    ]
    what = f"spec/net_speedup_est of {words(name)}, {where.words}, prefill apart; each {listed(rounds)}"
    text = f"the same with the prefill ({listed(whole)}) over what was measured"
    prefix = f"{where.prefix}.{name}.net_speedup_est"
    return [
        Row(prefix, what, statistics.median(rounds), "x"),
        Row(f"{prefix}.over_measured", text, statistics.median(over(whole, measured)), "x"),
    ]


def _choices(where: Where, name: str, times: Sequence[Timed[Result]], pays_up_to: int | None) -> list[Row]:
    """Return how often the engine chose a plain step, and up to which batch it expects drafts to pay."""
    counters = [sample.spec for each in times for sample in each.result.samples]
    num_off, num_rounds = sum(each.num_off_steps for each in counters), sum(each.num_rounds for each in counters)
    share = num_off / max(1, num_off + num_rounds)
    rows = [Row(f"{where.prefix}.{name}.plain_steps", f"plain steps of all steps, {words(name)}", share, "share")]
    if pays_up_to is not None:
        what = f"sequences at once up to which {words(name)} pays, by the engine at the end"
        rows.append(Row(f"{where.prefix}.{name}.pays_up_to", what, float(pays_up_to), "sequences"))
    return rows


def _same_replies(where: Where, times: Times) -> Row:
    """Compare every side's tokens with those without speculation, where the rule changes no token for a seed."""
    changing = (
        ()
        if where.rule in ("target_only", ON_CPU)
        else [name for name in times if name not in (OFF, FROM_HISTORY, PERFECT)]
    )
    sides = [name for name in times if name != OFF and name not in changing]
    num_same = num_replies = 0
    for name in sides:
        for ours, plain in zip(times[name], times[OFF], strict=True):
            replies, expected = ours.result.replies, plain.result.replies
            assert replies.keys() == expected.keys(), "a sample was lost"
            num_replies += len(expected)
            num_same += sum(replies[key] == expected[key] for key in expected)
    what = f"replies equal to those without speculation, {where.words}, {num_replies} replies of {', '.join(sides)}"
    return at_least(f"{where.prefix}.same_replies", what, num_same / num_replies, "share", 1.0)
