"""An SGLang engine whose server lets requests opt out drafts where that pays, and says what it knows.

What a round costs in plain steps is given to the engine, so that no other load on the machine decides what it does; how
it is measured is shown apart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from rollout.sglang_engine.canary import NoAnswer
from rollout.sglang_engine.client import ServerRefused
from rollout.sglang_engine.fake import FakeServer
from rollout.sglang_engine.round_meter import RoundMeter
from rollout.sglang_engine.speculation_trial import Measurement, Side, find_switch, measure
from slime_spec.metrics.engines import benefit_metrics
from slime_spec.metrics.rollout import rollout_metrics
from slime_spec.sglang.releases import NEWEST_READ, pinned_release
from slime_spec.sglang.server_info import ServerInfo
from slime_spec.sglang.speculation_control import (
    EXTRA_CONFIG as EXTRA,
)
from slime_spec.sglang.speculation_control import (
    SAMPLING_PARAMS as SAMPLING,
)
from slime_spec.sglang.speculation_control import (
    RequestSwitch,
    SpeculationControl,
    decides_by_batch,
    switches_to_try,
)
from slime_spec.speculation.rollout_switch import BatchUse
from slime_spec.types import GeneratedSample, GroupRequest, Prompt, Sample, SamplingParams
from tests.sglang.conftest import Checkpoints, Connect, OnFake
from tests.support.pushes import push_of

SLOW_S, QUICK_S = 0.06, 0.01
Switched = Callable[..., tuple["OnFake", "Given"]]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_meter_counts_seconds_and_tokens_by_running_streams() -> None:
    clock = Clock()
    meter = RoundMeter(clock)

    def at(now: float, call: Callable[[], None]) -> None:
        clock.now = now
        call()

    at(0.0, lambda: meter.brought("a", 1))  # of the prefill
    at(1.0, lambda: meter.brought("a", 3))
    at(2.0, lambda: meter.brought("b", 1))
    at(4.0, lambda: meter.brought("a", 2))
    at(4.5, lambda: meter.brought("b", 2))
    at(5.0, lambda: meter.closed("a"))
    at(7.0, lambda: meter.brought("b", 5))
    at(8.0, lambda: meter.closed("b"))
    clock.now = 20.0
    assert meter.take() == (BatchUse(2, 3.0, 4), BatchUse(1, 5.0, 8))
    assert meter.take() == ()


def test_a_pause_is_nobodys_time_and_a_queued_stream_does_not_run() -> None:
    clock = Clock()
    meter = RoundMeter(clock)
    meter.brought("a", 1)
    clock.now = 1.0
    meter.closed("queued")
    meter.hold()
    clock.now = 50.0
    meter.brought("a", 2)
    clock.now = 51.0
    meter.brought("a", 2)
    assert meter.take() == (BatchUse(1, 2.0, 4),)


def test_a_switch_stands_where_the_server_reads_it() -> None:
    body = {"rid": "1", "sampling_params": {"temperature": 1.0}}
    assert SAMPLING.put(body) == {
        "rid": "1",
        "sampling_params": {"temperature": 1.0, "disable_speculative_decoding": True},
    }
    assert EXTRA.put(body) == {**body, "extra_config": {"force_disable_sp_run": True}}
    assert body == {"rid": "1", "sampling_params": {"temperature": 1.0}}, "the request that drafts is left alone"


@pytest.mark.parametrize("switch", [None, EXTRA, SAMPLING])
def test_a_switch_is_found_where_a_request_with_it_has_no_round(connect: Connect, switch: RequestSwitch | None) -> None:
    on_fake = connect()
    on_fake.server.switch = switch
    client, loop = on_fake.engine.client, on_fake.engine.server.loop
    assert loop.call(find_switch(client, (5, 6, 7), "99.0")) == switch
    assert loop.call(find_switch(client, (5, 6, 7), NEWEST_READ)) == (None if switch == SAMPLING else switch)


def test_a_release_that_was_read_is_not_asked_for_what_ends_in_an_internal_error() -> None:
    for version in (NEWEST_READ, pinned_release().text, "0.5.10.post1"):
        assert switches_to_try(version) == (EXTRA,)
    for version in ("0.5.24", "0.6.0", "0.0.0.dev1", "?"):
        assert switches_to_try(version) == (EXTRA, SAMPLING)


def test_a_server_that_verifies_nothing_shows_no_switch(connect: Connect) -> None:
    on_fake = connect()
    on_fake.server.switch = RequestSwitch("sampling_params", "ignore_eos")  # which every request has
    with pytest.raises(NoAnswer, match="without a verify round"):
        on_fake.engine.server.loop.call(find_switch(on_fake.engine.client, (5, 6, 7), "99.0"))


def test_levels_say_who_decides() -> None:
    adaptive = ServerInfo.of({"version": "x", "speculative_adaptive": True})
    assert decides_by_batch(adaptive)
    assert not decides_by_batch(ServerInfo.of({"version": "x", "speculative_adaptive": False}))
    levels = [SpeculationControl(switch, by_batch).level for switch in (EXTRA, None) for by_batch in (True, False)]
    assert levels == ["requests", "requests", "batches", "nothing"]


def test_a_measurement_compares_a_round_with_a_plain_step() -> None:
    """Eight sequences: 24 tokens in 0.3 s with drafts that bring three a round, 8 in 0.1 s without, then 0.2 s."""
    drafted = Side(BatchUse(8, 0.3, 24), num_counted=300, num_rounds=100)
    plain, slower = Side(BatchUse(8, 0.1, 8)), Side(BatchUse(8, 0.2, 8))
    measured = Measurement(((drafted, plain), (drafted, slower)))
    assert measured.break_even == pytest.approx([3.0, 1.5])
    assert (measured.num_counted, measured.num_rounds) == (600, 200)


def test_both_sides_of_a_measurement_ask_the_same_and_one_of_them_opts_out(connect: Connect) -> None:
    on_fake = connect(FakeServer(delay_s=SLOW_S))
    on_fake.server.switch, on_fake.server.step_s = SAMPLING, QUICK_S
    sampling = {"temperature": 0.7, "top_p": 0.9}
    measuring = measure(on_fake.engine.client, [(5, 6), (7, 8)], sampling, 16, 3, SAMPLING)
    measured = on_fake.engine.server.loop.call(measuring)
    asked = on_fake.server.told("/generate")
    assert len(asked) == 4 * 3
    opted_out = [SAMPLING.field in body["sampling_params"] for body in asked]
    assert opted_out == [False] * 3 + [True] * 6 + [False] * 3, "with, without, without, with"
    assert {body["sampling_params"]["temperature"] for body in asked} == {0.7}
    assert all(body["sampling_params"]["ignore_eos"] for body in asked)
    # 15 tokens after the prefill's, three a round: 5 rounds of each of 3 requests on 2 sides.
    assert (measured.num_counted, measured.num_rounds) == (90, 30)
    assert max(measured.break_even) > 1.0, "near 6, less on a machine that is busy"


def test_requests_that_never_run_at_once_are_no_measurement(connect: Connect) -> None:
    on_fake = connect()
    measuring = measure(on_fake.engine.client, [(5, 6)], {}, 1, 2, SAMPLING)
    on_fake.server.switch = SAMPLING
    with pytest.raises(NoAnswer):
        on_fake.engine.server.loop.call(measuring)


@dataclass
class Given:
    """Measures as it is told: a round takes ``break_even`` plain steps at every batch and brings ``length`` tokens."""

    break_even: float
    length: float = 3.0
    error: Exception | None = None
    measured: list[int] = field(default_factory=list)

    async def __call__(
        self,
        client: object,
        prompts: Sequence[Sequence[int]],
        sampling: Mapping[str, Any],
        num_tokens: int,
        num_running: int,
        switch: RequestSwitch,
    ) -> Measurement:
        self.measured.append(num_running)
        if self.error is not None:
            raise self.error
        # For one token of each sequence: a round takes break_even / length, a plain step 1.
        use = BatchUse(num_running, self.break_even, 100)
        drafted = Side(use, num_counted=round(100 * self.length), num_rounds=100)
        pair = drafted, Side(BatchUse(num_running, self.length, 100))
        return Measurement((pair,) * 8)


@pytest.fixture
def switched(connect: Connect) -> Switched:
    """An engine on a server whose requests can opt out; a round takes ``break_even`` plain steps, and brings three."""

    def start(break_even: float, switch: RequestSwitch | None = EXTRA) -> tuple[OnFake, Given]:
        on_fake, given = connect(FakeServer(delay_s=QUICK_S), canary_prompts=2, canary_tokens=12), Given(break_even)
        on_fake.server.switch, on_fake.server.step_s = switch, QUICK_S
        on_fake.engine._speculation.measure = given
        return on_fake, given

    return start


def rollout_and_push(on_fake: OnFake, checkpoints: Checkpoints, version: int) -> list[GeneratedSample]:
    samples = on_fake.generate(num_tokens=25, num_samples=4)
    on_fake.push(push_of(checkpoints.target_weights(), version))
    return samples


def opted_out(on_fake: OnFake) -> list[bool]:
    """Of each request since the last look that belongs to a sample, whether it opted out."""
    asked = [body for body in on_fake.server.told("/generate") if body["rid"].startswith("group")]
    on_fake.server.calls.clear()
    return [EXTRA.parent in body for body in asked]


def metrics_of(on_fake: OnFake) -> dict[str, float]:
    return benefit_metrics([], [on_fake.engine.stats()])


def test_speculation_that_costs_more_than_it_brings_ends_with_the_next_push(
    switched: Switched, checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    on_fake, _ = switched(break_even=6.0)
    with caplog.at_level(logging.INFO):
        rollout_and_push(on_fake, checkpoints, 1)
    assert opted_out(on_fake) == [False] * 4
    assert "speculation control level=requests" in caplog.text
    assert "speculation is off from this push gain=0.500" in caplog.text
    found = metrics_of(on_fake)
    assert found["spec/net_speedup_est"] == pytest.approx(0.5)
    assert 0.0 < found["spec/net_speedup_err"] < 0.25
    assert found["spec/break_even_length"] == pytest.approx(6.0)
    assert found["spec/pays_up_to_batch"] == 0.0

    samples = rollout_and_push(on_fake, checkpoints, 2)
    assert opted_out(on_fake) == [True] * 4
    assert {(sample.spec.num_rounds, sample.spec.num_off_steps) for sample in samples} == {(0, 24)}
    step = [Sample(Prompt(0, "task", "text", (5, 6, 7), ""), each, "", 1.0) for each in samples]
    found = rollout_metrics(step)
    assert found["spec/off_ratio"] == 1.0
    assert "rollout/spec_accept_length" not in found
    assert 0.5 < metrics_of(on_fake)["spec/net_speedup_est"] < 1.0, "two rollouts, of which one did not draft"


def test_speculation_that_pays_goes_on(switched: Switched, checkpoints: Checkpoints) -> None:
    on_fake, given = switched(break_even=1.5)
    for version in (1, 2):
        rollout_and_push(on_fake, checkpoints, version)
    assert opted_out(on_fake) == [False] * 8
    found = metrics_of(on_fake)
    assert found["spec/net_speedup_est"] == pytest.approx(2.0)
    assert found["spec/pays_up_to_batch"] == max(given.measured)


def test_speculation_begins_again_when_drafts_have_become_better(switched: Switched, checkpoints: Checkpoints) -> None:
    on_fake, given = switched(break_even=3.4)
    rollout_and_push(on_fake, checkpoints, 1)
    given.length = 3.9
    rollout_and_push(on_fake, checkpoints, 2)
    assert opted_out(on_fake) == [False] * 4 + [True] * 4
    rollout_and_push(on_fake, checkpoints, 3)
    assert opted_out(on_fake) == [False] * 4


def test_an_engine_that_is_off_measures_nothing_where_perfect_drafts_would_not_pay(
    switched: Switched, checkpoints: Checkpoints
) -> None:
    on_fake, given = switched(break_even=6.0)
    rollout_and_push(on_fake, checkpoints, 1)
    known = set(given.measured)
    for version in (2, 3):
        rollout_and_push(on_fake, checkpoints, version)
    assert len(given.measured) == len(set(given.measured)), "batches not seen before, each once"
    assert known <= set(given.measured)


def test_requests_of_a_rollout_that_goes_on_over_a_push_are_not_taken_for_those_of_the_next(
    switched: Switched, checkpoints: Checkpoints
) -> None:
    """Four samples draft on while their engine turns drafts off: what runs then is neither the one nor the other."""
    on_fake, _ = switched(break_even=6.0)
    rollout_and_push(on_fake, checkpoints, 1)
    before = metrics_of(on_fake)["spec/net_speedup_est"]
    on_fake.server.delay_s = on_fake.server.step_s = SLOW_S
    params = SamplingParams(max_new_tokens=60)
    going = on_fake.engine.generate(GroupRequest("group-2", (5, 6, 7), (0,), params))
    engine_policy = on_fake.engine._speculation._policy
    assert engine_policy is not None
    engine_policy.accept_length.observe(10**9, 10**8)
    on_fake.push(push_of(checkpoints.target_weights(), 2))
    list(going)
    assert engine_policy.speculates, "decided by the time before the push"
    after = metrics_of(on_fake)["spec/net_speedup_est"]
    on_fake.push(push_of(checkpoints.target_weights(), 3))
    assert metrics_of(on_fake)["spec/net_speedup_est"] == after >= before


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_server_without_a_switch_is_left_as_it_is_and_said_so_once(
    switched: Callable[..., OnFake], checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture, adaptive: bool
) -> None:
    on_fake, given = switched(break_even=6.0, switch=None)
    info = on_fake.engine.server.info
    on_fake.engine.server.info = replace(info, flags={"speculative_adaptive": adaptive})
    with caplog.at_level(logging.INFO):
        for version in (1, 2, 3):
            rollout_and_push(on_fake, checkpoints, version)
    assert opted_out(on_fake) == [False] * 12
    told = [record.message for record in caplog.records if "speculation control" in record.message]
    assert len(told) == 1
    assert f"level={'batches' if adaptive else 'nothing'}" in told[0]
    assert metrics_of(on_fake) == {}, "no number is invented"
    assert given.measured == []


@pytest.mark.parametrize("error", [NoAnswer("nothing"), ServerRefused("/generate", 429, "busy"), TimeoutError()])
def test_a_measurement_that_fails_ends_no_push(
    switched: Switched, checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    on_fake, given = switched(break_even=6.0)
    given.error = error
    rollout_and_push(on_fake, checkpoints, 1)
    assert "was not measured after this push" in caplog.text
    assert metrics_of(on_fake) == {}
    assert {sample.weight_version for sample in on_fake.generate(num_tokens=25)} == {1}
    assert opted_out(on_fake) == [False] * 5
    given.error = None
    rollout_and_push(on_fake, checkpoints, 2)
    assert metrics_of(on_fake)["spec/net_speedup_est"] == pytest.approx(0.5), "measured after the next push"
