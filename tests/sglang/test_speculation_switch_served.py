"""An SGLang engine finds the switch of a real server, this project's own, and the server does what it decides."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rollout.sglang_engine.engine import SglangEngine
from slime_spec.config.tree import Config, SpeculativeConfig
from slime_spec.metrics.engines import benefit_metrics
from slime_spec.sglang.speculation_control import EXTRA_CONFIG
from slime_spec.types import GroupRequest, SamplingParams
from slime_spec.weights.run import run_push
from tests.sglang.conftest import Checkpoints
from tests.support.http_server import served
from tests.support.pushes import DirectTransport, push_of


@pytest.fixture
def trained(config: Config) -> Config:
    """A run that pushes by disk, as this server takes weights from a client of SGLang; its drafts have no weights."""
    return replace(
        config,
        run=replace(config.run, mode="train"),
        engine=replace(config.engine, context_length=256),
        speculative=SpeculativeConfig(algorithm="NGRAM", num_draft_tokens=4),
        sglang_server=replace(config.sglang_server, transport="disk", canary_prompts=2, canary_tokens=24),
    )


def test_requests_opt_out_of_speculation_on_a_real_server_and_rollouts_are_compared(
    trained: Config, checkpoints: Checkpoints
) -> None:
    request = GroupRequest("group", (5, 6, 7), (0, 1, 2, 3), SamplingParams(40, temperature=1.0, ignore_eos=True))
    with served(replace(trained, rollout=replace(trained.rollout, engine="embedded"))) as server:
        address = server.url.removeprefix("http://")
        settings = replace(trained.sglang_server, external_addrs=(address,))
        engine = SglangEngine(replace(trained, sglang_server=settings), 0, DirectTransport())
        engine.start()
        try:
            for version in (1, 2, 3):
                drafts = engine._speculation.off_switch is None
                samples = list(engine.generate(request))
                assert {sample.spec.num_rounds > 0 for sample in samples} == {drafts}
                assert {sample.spec.num_off_steps for sample in samples} == {0 if drafts else 39}
                messages = push_of(checkpoints.target_weights(), version)
                run_push(messages, lambda message: [engine.update_weights(message)])
                # The next rollout does the other thing, whatever was faster on this machine.
                policy = engine._speculation._policy
                assert policy is not None
                policy.speculates = not drafts
            control, found = engine._speculation.control, benefit_metrics([], [engine.stats()])
        finally:
            engine.stop()
    assert control is not None
    assert control.switch == EXTRA_CONFIG
    assert found["spec/net_speedup_est"] > 0.0
    assert found["spec/net_speedup_err"] > 0.0
    assert found["spec/break_even_length"] > 0.0
