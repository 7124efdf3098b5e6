"""An SGLang engine whose server lets requests opt out drafts where that pays, and says what it knows.

The fake server takes a given time for a round and for a step; ratios are far from even, so that no other load on the
machine decides what these tests find.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest

from rollout.sglang_engine.canary import NoAnswer
from rollout.sglang_engine.fake import FakeServer
from rollout.sglang_engine.round_meter import RoundMeter
from rollout.sglang_engine.speculation_trial import Measurement, Side, find_switch, measure
from slime_spec.metrics.engines import benefit_metrics
from slime_spec.metrics.rollout import rollout_metrics
from slime_spec.sglang.server_info import ServerInfo
from slime_spec.sglang.speculation_control import SWITCHES, RequestSwitch, SpeculationControl, decides_by_batch
from slime_spec.speculation.rollout_switch import BatchUse
from slime_spec.types import GeneratedSample, Prompt, Sample
from tests.sglang.conftest import Checkpoints, Connect, OnFake
from tests.support.pushes import push_of

EXTRA, SAMPLING = SWITCHES
SLOW_S, QUICK_S = 0.06, 0.01


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
    assert loop.call(find_switch(client, (5, 6, 7))) == switch


def test_a_server_that_verifies_nothing_shows_no_switch(connect: Connect) -> None:
    on_fake = connect()
    on_fake.server.switch = RequestSwitch("sampling_params", "ignore_eos")  # which every request has
    with pytest.raises(NoAnswer, match="without a verify round"):
        on_fake.engine.server.loop.call(find_switch(on_fake.engine.client, (5, 6, 7)))


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
    assert all(2.0 < ratio < 8.0 for ratio in measured.break_even), "near 6, less on a machine that is busy"


def test_requests_that_never_run_at_once_are_no_measurement(connect: Connect) -> None:
    on_fake = connect()
    measuring = measure(on_fake.engine.client, [(5, 6)], {}, 1, 2, SAMPLING)
    on_fake.server.switch = SAMPLING
    with pytest.raises(NoAnswer):
        on_fake.engine.server.loop.call(measuring)


@pytest.fixture
def switched(connect: Connect, checkpoints: Checkpoints) -> Callable[..., OnFake]:
    """An engine on a server whose requests can opt out; ``round_s`` and ``step_s`` are what its rounds take."""

    def start(round_s: float, step_s: float, switch: RequestSwitch | None = EXTRA) -> OnFake:
        on_fake = connect(FakeServer(delay_s=round_s), canary_prompts=2, canary_tokens=12)
        on_fake.server.switch, on_fake.server.step_s = switch, step_s
        return on_fake

    return start


def rollout_and_push(on_fake: OnFake, checkpoints: Checkpoints, version: int) -> list[GeneratedSample]:
    samples = on_fake.generate(num_tokens=24, num_samples=4)
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
    switched: Callable[..., OnFake], checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    on_fake = switched(round_s=SLOW_S, step_s=QUICK_S)
    with caplog.at_level(logging.INFO):
        rollout_and_push(on_fake, checkpoints, 1)
    assert opted_out(on_fake) == [False] * 4
    assert "speculation control level=requests" in caplog.text
    assert "speculation is off from this push" in caplog.text
    found = metrics_of(on_fake)
    assert 0.2 < found["spec/net_speedup_est"] < 0.9
    assert 0.0 < found["spec/net_speedup_err"] < 0.5
    assert found["spec/break_even_length"] > 3.0, "a round brings three tokens"
    assert found["spec/pays_up_to_batch"] == 0.0

    samples = rollout_and_push(on_fake, checkpoints, 2)
    assert opted_out(on_fake) == [True] * 4
    assert {(sample.spec.num_rounds, sample.spec.num_off_steps) for sample in samples} == {(0, 23)}
    step = [Sample(Prompt(0, "task", "text", (5, 6, 7), ""), each, "", 1.0) for each in samples]
    found = rollout_metrics(step)
    assert found["spec/off_ratio"] == 1.0
    assert "rollout/spec_accept_length" not in found


def test_speculation_that_pays_goes_on(switched: Callable[..., OnFake], checkpoints: Checkpoints) -> None:
    on_fake = switched(round_s=0.02, step_s=0.02)
    for version in (1, 2):
        rollout_and_push(on_fake, checkpoints, version)
    assert opted_out(on_fake) == [False] * 8
    found = metrics_of(on_fake)
    assert found["spec/net_speedup_est"] > 1.5
    assert found["spec/pays_up_to_batch"] == 4.0


def test_speculation_begins_again_when_it_pays(switched: Callable[..., OnFake], checkpoints: Checkpoints) -> None:
    on_fake = switched(round_s=SLOW_S, step_s=QUICK_S)
    rollout_and_push(on_fake, checkpoints, 1)
    on_fake.server.delay_s, on_fake.server.step_s = QUICK_S, SLOW_S
    on_fake.engine._speculation._policy.break_even._pairs.clear()  # type: ignore[union-attr]
    rollout_and_push(on_fake, checkpoints, 2)
    opted_out(on_fake)
    rollout_and_push(on_fake, checkpoints, 3)
    assert opted_out(on_fake) == [False] * 4


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_server_without_a_switch_is_left_as_it_is_and_said_so_once(
    switched: Callable[..., OnFake], checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture, adaptive: bool
) -> None:
    on_fake = switched(round_s=SLOW_S, step_s=QUICK_S, switch=None)
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


def test_a_measurement_that_fails_ends_no_push(
    switched: Callable[..., OnFake],
    checkpoints: Checkpoints,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_fake = switched(round_s=QUICK_S, step_s=QUICK_S)
    rollout_and_push(on_fake, checkpoints, 1)
    before = metrics_of(on_fake)

    async def refused(*_: object) -> Measurement:
        raise NoAnswer("nothing")

    on_fake.engine._speculation._policy.break_even._pairs.clear()  # type: ignore[union-attr]
    monkeypatch.setattr("rollout.sglang_engine.speculation_switch.measure", refused)
    rollout_and_push(on_fake, checkpoints, 2)
    assert "was not measured after this push reason=nothing" in caplog.text
    assert metrics_of(on_fake).get("spec/net_speedup_est") == before["spec/net_speedup_est"]
    assert {sample.weight_version for sample in on_fake.generate()} == {2}
