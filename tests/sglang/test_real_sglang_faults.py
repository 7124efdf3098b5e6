"""One real server with a key, a short queue and a watched silence: what it refuses, hides and is replaced for."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from rollout.sglang_engine.client import ServerRefused, SglangClient
from rollout.sglang_engine.engine import SglangEngine
from slime_spec.types import GroupRequest, SamplingParams
from slime_spec.weights.messages import ContinueGeneration, PauseGeneration, PauseMode
from tests.sglang.test_api_key import KEY, command_lines, key_file
from tests.support.sglang_real import PROMPTS, Models, cpu_environment, started

pytestmark = [pytest.mark.long, pytest.mark.sglang_server]

NUM_TOKENS = 60
WAIT_S = 120.0


@pytest.fixture(scope="module")
def engine(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangEngine]:
    source = key_file(tmp_path_factory.mktemp("key"), KEY)
    config = models.config("NONE", tmp_path_factory.mktemp("run"), api_key_file=str(source), stall_timeout_s=15.0)
    config = replace(
        config,
        engine=replace(config.engine, max_running_requests=2),
        sglang={**config.sglang, "max_queued_requests": 2},
    )
    with cpu_environment(), started(config) as engine:
        yield engine


def request(num_samples: int, num_tokens: int = NUM_TOKENS) -> GroupRequest:
    params = SamplingParams(num_tokens, temperature=0.0, ignore_eos=True)
    return GroupRequest("group", PROMPTS[0], tuple(range(num_samples)), params)


def wait_for_tokens(engine: SglangEngine) -> None:
    deadline = time.monotonic() + WAIT_S
    while not any(run.num_tokens for run in engine.samples.in_progress):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_no_sample_is_lost_where_the_queue_is_full(engine: SglangEngine) -> None:
    """Case sglang/03-http: 7 of 12 came back aborted."""
    (alone,) = engine.generate(request(1))
    samples = list(engine.generate(request(12)))
    assert {sample.finish_reason for sample in samples} == {"length"}
    assert [sample.token_ids for sample in samples] == [alone.token_ids] * 12
    assert engine.stats().num_interruptions > 0


def test_the_key_is_in_no_command_line_and_no_log(engine: SglangEngine) -> None:
    """Case sglang/11-key; SGLang itself logs all its arguments and reports them."""
    assert [line for line in command_lines() if KEY in line] == []
    assert "api_key" not in engine.server.info.flags
    folder = Path(str(engine.config.run.output_dir))
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert [path for path in written if KEY.encode() in path.read_bytes()] == []
    assert any("***" in path.read_text(errors="replace") for path in written)
    keyless = SglangClient(engine.client.url)
    engine.server.loop.call(keyless.open())
    with pytest.raises(ServerRefused, match="401"):
        engine.server.loop.call(keyless.get("/server_info"))
    engine.server.loop.call(keyless.close())


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_paused_server_is_not_replaced_although_its_health_turns_bad(engine: SglangEngine, mode: PauseMode) -> None:
    (alone,) = engine.generate(request(1, 300))
    generation = engine.generate(request(1, 300))
    wait_for_tokens(engine)
    engine.update_weights(PauseGeneration(0, mode))
    supervisor = engine.server.supervisor
    assert supervisor is not None
    deadline = time.monotonic() + WAIT_S
    with engine.server.exclusive:  # so that nobody asks: an answer to any question is a good health
        while engine.server.loop.call(engine.client.is_healthy(WAIT_S)):  # until nothing has come for 20 s
            assert time.monotonic() < deadline
        assert supervisor._trouble() == ""
    supervisor.suspect()
    engine.update_weights(ContinueGeneration(0))
    (sample,) = generation
    assert sample.token_ids == alone.token_ids
    assert engine.stats().num_restarts == 0


def test_a_stopped_server_is_replaced_and_its_samples_go_on(engine: SglangEngine) -> None:
    """Case sglang/01-hang; the scheduler alone is stopped, so that HTTP is still answered."""
    assert engine.server.supervisor is not None
    process = engine.server.supervisor.server._process
    assert process is not None
    schedulers = [each for each in psutil.Process(process.pid).children(recursive=True) if "scheduler" in each.name()]
    assert schedulers
    (alone,) = engine.generate(request(1, 300))
    generation = engine.generate(request(1, 300))
    wait_for_tokens(engine)
    for each in schedulers:
        with suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGSTOP)
    (sample,) = generation
    assert sample.token_ids == alone.token_ids
    assert engine.stats().num_restarts == 1
