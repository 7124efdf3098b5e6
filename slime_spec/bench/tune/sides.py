"""Sides are engines' cores in this process that share the target's weights; a side may fix the depth of its drafts.

Nothing but the core whose turn it is computes, so on a CPU this process's CPU time is the core's. Passes are timed
once: every core that speculates starts from the first one's costs, and corrects them by its own rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from time import process_time

from rollout.embedded.assemble import Assembly, share_target
from rollout.embedded.calibrate import calibrate
from rollout.embedded.core import GenerationCore
from slime_spec.algorithms import NONE
from slime_spec.bench.fixed_depth import fixed_depth
from slime_spec.bench.pays.scenarios import Waves
from slime_spec.bench.pays.sides import Result, generate
from slime_spec.bench.timing import Time, Timed, settled, timed
from slime_spec.bench.tune.candidates import Candidate
from slime_spec.config.speculative import SpeculativeConfig
from slime_spec.config.tree import Config
from slime_spec.speculation.round_costs import RoundCosts

OFF = Candidate("off", SpeculativeConfig(algorithm=NONE.name))


@dataclass(frozen=True)
class Side:
    """Holds a candidate's core, and the depth of every round's drafts; None leaves it to the engine's controller."""

    candidate: Candidate
    core: GenerationCore
    depth: int | None = None

    @property
    def name(self) -> str:
        """Return the side's name: ``EAGLE3 builtin:smollm2-135m-eagle3, block, 3``."""
        if self.core.settings.is_automatic:
            return f"{self.candidate.title}, {'auto' if self.depth is None else self.depth}"
        return self.candidate.title

    @property
    def costs(self) -> RoundCosts:
        costs = self.core.speculation.costs
        assert costs is not None, "a core that speculates has timed its passes"
        return costs

    @property
    def max_depth(self) -> int:
        return self.core.speculation.shape.num_steps

    def run(self, waves: Waves) -> Result:
        """Generate the waves as this side drafts."""
        with nullcontext() if self.depth is None else fixed_depth(self.core, self.depth):
            return generate(self.core, waves)


@dataclass
class Cores:
    """Starts cores of one configuration; ``time`` says whether sides are compared by CPU seconds or by the clock."""

    config: Config
    max_running: int
    _first: GenerationCore | None = None
    _costs: RoundCosts | None = None
    _started: dict[Candidate, GenerationCore] = field(default_factory=dict)

    @property
    def time(self) -> Time:
        return "seconds" if self.config.rollout.num_gpus_per_engine else "cpu_s"

    @property
    def clock(self) -> Callable[[], float]:
        return settled if self.time == "seconds" else process_time

    def off(self) -> Side:
        return self.side(OFF)

    def side(self, candidate: Candidate, depth: int | None = None) -> Side:
        """Return a side of the candidate's core, which is started where it has not been."""
        if candidate not in self._started:
            self._started[candidate] = self._start(candidate)
        return Side(candidate, self._started[candidate], depth)

    def drop(self, candidate: Candidate) -> None:
        """Give up a core that takes no further turn, with its draft."""
        self._started.pop(candidate, None)

    def timed(self, side: Side, waves: Waves) -> Timed[Result]:
        return timed(lambda: side.run(waves))

    def seconds(self, one: Timed[Result]) -> float:
        return float(getattr(one, self.time))

    def _start(self, candidate: Candidate) -> GenerationCore:
        engine = replace(self.config.engine, max_running_requests=self.max_running)
        config = replace(self.config, engine=engine, speculative=candidate.settings)
        core = Assembly(config).core(0, self.clock)
        if self._first is None:
            self._first = core
        else:
            share_target(core, self._first)  # and the second copy of its weights goes away
        if self._costs is None:
            calibrate(core)
            self._costs = core.speculation.costs
        else:
            core.speculation.use_costs(self._costs.fresh(), core.settings.is_automatic, self.max_running)
        return core
