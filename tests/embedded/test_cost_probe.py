"""The cost of a round beside that of a plain step of the same batch: timed apart, unfelt by what is generated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rollout.embedded.core import GenerationCore
from rollout.embedded.cost_probe import CostProbe
from rollout.embedded.engine import EmbeddedEngine
from rollout.embedded.target import Timing
from slime_spec.metrics.engines import benefit_metrics
from slime_spec.transports.in_process import InProcessTransport
from slime_spec.types import GroupRequest, Prompt, Sample, SamplingParams
from tests.support.embedded_harness import Samples, engine_config, make_core, random_prompt, run


class Clock:
    """Shows the time it was put to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def timed_rounds(interval: int, num_rounds: int, typical: bool = True) -> tuple[CostProbe, Timing, list[int]]:
    """A probe after rounds of 3 s; its plain steps take 2 s. Also the rounds that were probed, from 1."""
    clock, timing, probed = Clock(), Timing(), []
    starts: list[float] = []
    probe = CostProbe(interval, timing, clock)

    def plain_step() -> None:
        clock.now += 2.0
        timing.forward_s += 1.5
        probed.append(len(starts))

    for _ in range(num_rounds):
        starts.append(clock.now)
        with probe.around(plain_step, typical):
            clock.now += 3.0
            timing.forward_s += 2.5
        timing.total_s += clock.now - starts[-1]
    return probe, timing, probed


def test_one_round_in_the_interval_is_timed_and_the_first_comes_soon() -> None:
    probe, _, probed = timed_rounds(16, 40)
    assert probed == [2, 2, 18, 34], "before the first timed step an untimed one warms up"
    assert (probe.round_s, probe.plain_s) == (9.0, 6.0)


def test_the_plain_steps_are_not_counted_as_work() -> None:
    _, timing, probed = timed_rounds(16, 40)
    assert probed
    assert (timing.total_s, timing.forward_s) == (40 * 3.0, 40 * 2.5)


@pytest.mark.parametrize(("interval", "typical"), [(0, True), (16, False)])
def test_nothing_is_timed_where_it_is_switched_off_or_rows_only_decode(interval: int, typical: bool) -> None:
    probe, _, probed = timed_rounds(interval, 40, typical)
    assert probed == []
    assert probe.plain_s == 0.0


def generated(folder: Path, interval: int, speculative: bool) -> tuple[Samples, GenerationCore]:
    """Sampled replies to prompts of which LOOKUP finds repetitions, in a batch that changes as they end."""
    config = engine_config(folder, "LOOKUP")
    core = make_core(replace(config, engine=replace(config.engine, cost_probe_interval=interval)))
    params = SamplingParams(max_new_tokens=40, temperature=0.7, speculative=speculative)
    prompts = [random_prompt(6, seed) * 3 for seed in range(3)]
    requests = [GroupRequest(str(i), prompt, (i, 10 + i), params) for i, prompt in enumerate(prompts)]
    return run(core, requests), core


def test_what_is_generated_does_not_depend_on_it(tiny_llama: Path) -> None:
    with_probe, probed = generated(tiny_llama, 8, speculative=True)
    without, plain = generated(tiny_llama, 0, speculative=True)
    for key, sample in without.items():
        assert with_probe[key].token_ids == sample.token_ids
        assert with_probe[key].logprobs == sample.logprobs
        assert with_probe[key].spec == sample.spec
    assert probed.probe.round_s > 0
    assert probed.probe.plain_s > 0
    assert plain.probe.plain_s == 0.0


def test_requests_that_do_not_speculate_are_not_probed(tiny_llama: Path) -> None:
    _, core = generated(tiny_llama, 8, speculative=False)
    assert core.probe.plain_s == 0.0


def test_the_engine_tells_the_metrics_what_its_rounds_cost(tiny_llama: Path) -> None:
    config = engine_config(tiny_llama, "LOOKUP", cost_probe_interval=8)
    engine = EmbeddedEngine(config, 0, InProcessTransport())
    engine.start()
    try:
        params = SamplingParams(max_new_tokens=40, temperature=0.7)
        (response,) = engine.generate(GroupRequest("0", random_prompt(6, 0) * 3, (1,), params))
        stats = engine.stats()
    finally:
        engine.stop()
    assert stats.speculates
    prompt = Prompt(0, "task", "?", (1,), "x")
    values = benefit_metrics([stats], [Sample(prompt, response, "", 1.0)])
    assert values["spec/break_even_length"] > 0
    per_round = 39 / response.spec.num_rounds
    assert values["spec/net_speedup_est"] == pytest.approx(per_round / values["spec/break_even_length"])
