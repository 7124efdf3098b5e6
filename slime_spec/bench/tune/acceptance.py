"""Acceptance is counted by position, each drafter drafting as deep as its shape goes in every round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from slime_spec.bench.fixed_depth import FITTED_TOKENS, fit_drafting
from slime_spec.bench.pays.sides import Result
from slime_spec.bench.timing import tell
from slime_spec.bench.tune.candidates import Candidate
from slime_spec.bench.tune.sides import Cores, Side
from slime_spec.bench.tune.workload import Workload
from slime_spec.preflight.checks.metrics import BAR
from slime_spec.speculation.counters import accepted_per_position, pooled

AT_ONCE = 8  # sequences: some two hundred rounds


@dataclass(frozen=True)
class Acceptance:
    """Holds how drafts of one candidate stood; ``rates[i]`` is position i's, given the positions before it.

    ``num_tried[i]`` rounds drafted position i and accepted those before. ``gained`` are accepted drafts, and
    ``drafted`` drafts, a step, steps without a draft (a text without a match) included. Of a server that does not count
    by position ``rates`` are empty; of a server that counts nothing ``gained`` and ``drafted`` are None, too.
    Example: ``Acceptance("LOOKUP", "", rates=(0.5, 0.8), num_tried=(40, 20), gained=0.3, drafted=1.1)``
    """

    name: str
    rule: str
    rates: tuple[float, ...]
    num_tried: tuple[int, ...]
    gained: float | None
    drafted: float | None

    @property
    def cumulative(self) -> tuple[float, ...]:
        """Return the shares of rounds with a draft that accepted the positions up to each."""
        return tuple(accumulate(self.rates, mul))

    @property
    def num_passed(self) -> int:
        """Return how many of the first positions are above RTP-LLM's bar, counted from the first on."""
        passed = 0
        for rate, bar in zip(self.cumulative, BAR, strict=False):
            if rate <= bar:
                break
            passed += 1
        return passed


def acceptance_of(candidate: Candidate, result: Result) -> Acceptance:
    """Count the samples of rounds that drafted as deep as they could."""
    spec = pooled(sample.spec for sample in result.samples)
    accepted = accepted_per_position(spec)
    rates = [stood / tried for stood, tried in zip(accepted, spec.num_tried, strict=False) if tried]
    num_steps = spec.num_rounds + spec.num_off_steps
    gained, drafted = spec.num_correct / max(1, num_steps), spec.num_drafted / max(1, num_steps)
    return Acceptance(candidate.name, candidate.rule, tuple(rates), spec.num_tried, gained, drafted)


def measure_acceptance(cores: Cores, candidates: Sequence[Candidate], workload: Workload) -> list[Acceptance]:
    """Measure every candidate on the same requests; a network's rounds of other sizes follow, for their costs."""
    found = []
    for number, candidate in enumerate(candidates, start=1):
        side = cores.side(candidate.alone)
        tell(f"acceptance by position, {number} of {len(candidates)}: {candidate.title}")
        deepest = Side(side.candidate, side.core, side.max_depth)
        found.append(acceptance_of(candidate, deepest.run(workload.waves(AT_ONCE, 0))))
        if candidate.has_network:
            fit_drafting(side.core, lambda batch: workload.waves(batch, 1, FITTED_TOKENS)[0])
    return found
