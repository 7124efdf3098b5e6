"""A plain step of the running batch is timed now and then, unfelt by what is generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rollout.embedded.cost_probe import CostProbe
from rollout.embedded.engine import EmbeddedEngine
from rollout.embedded.target import Timing
from slime_spec.metrics.engines import benefit_metrics
from slime_spec.speculation.controller import Controller, RoundPlan, RowState
from slime_spec.speculation.net_benefit import NetBenefit
from slime_spec.speculation.round_costs import PassCurve, RoundCosts
from slime_spec.transports.in_process import InProcessTransport
from slime_spec.types import GroupRequest, SamplingParams
from tests.support.embedded_harness import ReplayDrafter, Samples, engine_config, make_core, random_prompt, run

FREE = PassCurve(((1, 1.0), (64, 1.0)))  # rows cost nothing


class Clock:
    """Shows the time it was put to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def timed_rounds(interval: int, num_rounds: int) -> tuple[list[float], Timing, list[int]]:
    """What a probe said before rounds of 3 s; its plain steps take 2 s. Also the rounds that were probed, from 1."""
    clock, timing, probed = Clock(), Timing(), []
    starts: list[float] = []
    said: list[float] = []
    probe = CostProbe(interval, timing, clock, clock)

    def plain_step() -> None:
        clock.now += 2.0
        timing.forward_s += 1.5
        probed.append(len(starts))

    for _ in range(num_rounds):
        starts.append(clock.now)
        said.append(probe.step_s(plain_step))
        clock.now += 3.0
        timing.forward_s += 2.5
        timing.total_s += clock.now - starts[-1]
    return said, timing, probed


def test_one_round_in_the_interval_is_timed_and_the_first_comes_soon() -> None:
    said, _, probed = timed_rounds(16, 40)
    assert probed == [2, 2, 18, 34], "before the first timed step an untimed one warms up"
    assert [seconds for seconds in said if seconds] == [2.0, 2.0, 2.0]


def test_the_plain_steps_are_not_counted_as_work() -> None:
    _, timing, probed = timed_rounds(16, 40)
    assert probed
    assert (timing.total_s, timing.forward_s) == (40 * 3.0, 40 * 2.5)


def test_nothing_is_timed_where_it_is_switched_off() -> None:
    said, _, probed = timed_rounds(0, 40)
    assert probed == []
    assert not any(said)


def generated(folder: Path, interval: int, speculative: bool) -> Samples:
    """Sampled replies to prompts of which LOOKUP finds repetitions, in a batch that changes as they end."""
    config = engine_config(folder, "LOOKUP")
    core = make_core(replace(config, engine=replace(config.engine, cost_probe_interval=interval)))
    params = SamplingParams(max_new_tokens=40, temperature=0.7, speculative=speculative)
    prompts = [random_prompt(6, seed) * 3 for seed in range(3)]
    requests = [GroupRequest(str(i), prompt, (i, 10 + i), params) for i, prompt in enumerate(prompts)]
    return run(core, requests)


def test_what_is_generated_does_not_depend_on_it(tiny_llama: Path) -> None:
    with_probe = generated(tiny_llama, 8, speculative=True)
    without = generated(tiny_llama, 0, speculative=True)
    for key, sample in without.items():
        assert with_probe[key].token_ids == sample.token_ids
        assert with_probe[key].logprobs == sample.logprobs
        assert with_probe[key].spec == sample.spec


def test_the_engine_tells_the_metrics_what_its_rounds_cost(tiny_llama: Path) -> None:
    config = engine_config(tiny_llama, "LOOKUP", cost_probe_interval=8)
    engine = EmbeddedEngine(config, 0, InProcessTransport())
    engine.start()
    try:
        before = engine.stats()
        params = SamplingParams(max_new_tokens=40, temperature=0.7)
        (response,) = engine.generate(GroupRequest("0", random_prompt(6, 0) * 3, (1,), params))
        stats = engine.stats()
    finally:
        engine.stop()
    assert stats.speculates
    assert before.benefit == NetBenefit()
    values = benefit_metrics([before], [stats])
    assert values["spec/break_even_length"] > 0
    # Of one sequence every round brings tokens, all but the prefill's: what a round brings over what it costs.
    per_round = 39 / response.spec.num_rounds
    assert values["spec/net_speedup_est"] == pytest.approx(per_round / values["spec/break_even_length"], rel=0.5)
    assert values["spec/net_speedup_err"] >= 0.0


class Steady(Controller):
    """Lets every sequence draft, or none."""

    def __init__(self, drafts: bool) -> None:
        super().__init__(RoundCosts(FREE), 4)
        self._drafts = drafts

    def plan(self, rows: Sequence[RowState]) -> RoundPlan:
        return RoundPlan(tuple(row.max_depth if self._drafts else 0 for row in rows))

    def again(self, limits: Sequence[int]) -> RoundPlan | None:
        return None


class Counted(RoundCosts):
    """Counts the passes that it is told of: one for every round, and one for every plain step that was probed."""

    num_passes = 0

    def observe_pass(self, rows: int, attended: int, seconds: float) -> None:
        self.num_passes += 1


@pytest.mark.parametrize("drafts", [True, False])
def test_rounds_that_are_plain_steps_are_not_probed(tiny_llama: Path, drafts: bool) -> None:
    request = GroupRequest("0", random_prompt(6, 0) * 3, (1,), SamplingParams(max_new_tokens=40, ignore_eos=True))
    plain = run(make_core(engine_config(tiny_llama)), [request])
    config = engine_config(tiny_llama, cost_probe_interval=2)
    core = make_core(config, drafter=ReplayDrafter(plain, [request.prompt_token_ids]))
    core.speculation.controller, core.speculation.costs = Steady(drafts), (costs := Counted(FREE))
    (sample,) = run(core, [request]).values()
    num_rounds = sum(sample.spec.histogram)
    assert num_rounds == (8 if drafts else 39)  # of four right drafts and the token after them
    assert costs.num_passes == num_rounds + (3 if drafts else 0)  # beside every other round after the first
