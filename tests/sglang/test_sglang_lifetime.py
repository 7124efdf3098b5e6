"""A server that dies at a bad moment: while it is offloaded, while something has it to itself, while it is ended."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from rollout.sglang_engine.engine import SglangEngine
from rollout.sglang_engine.server import ServerProcess
from rollout.sglang_engine.supervise import Supervisor
from slime_spec.config.tree import Config
from slime_spec.types import GroupRequest, SamplingParams
from slime_spec.weights.messages import ContinueGeneration, PauseGeneration, PushMessage, PushReply, VerifyPush
from slime_spec.weights.run import run_push
from tests.sglang.conftest import Checkpoints
from tests.support.pushes import DirectTransport, other_weights, push_of

ROOT = Path(__file__).resolve().parents[2]
REQUEST = GroupRequest("group", (5, 6, 7), (1, 2), SamplingParams(max_new_tokens=300))


@pytest.fixture
def engine(config: Config, monkeypatch: pytest.MonkeyPatch) -> Iterator[SglangEngine]:
    """On a fake server that is a process, as SGLang is."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'tests' / 'support' / 'sglang_fake'}{os.pathsep}{ROOT}")
    engine = SglangEngine(
        replace(config, sglang_server=replace(config.sglang_server, max_restarts=2)), 0, DirectTransport()
    )
    engine.start()
    yield engine
    engine.stop()


def supervisor_of(engine: SglangEngine) -> Supervisor:
    assert engine.server.supervisor is not None
    return engine.server.supervisor


def kill_server(engine: SglangEngine) -> None:
    process = supervisor_of(engine).server._process
    assert process is not None
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()


def test_a_server_that_dies_while_it_is_offloaded_is_replaced_when_its_memory_is_there_again(
    engine: SglangEngine,
) -> None:
    engine.set_resident(False)
    kill_server(engine)
    assert engine.wait_serving(True) is False
    time.sleep(1.5)  # SGLang sizes its cache by the memory that is free at its start, which the trainer has now
    assert (engine.stats().num_restarts, supervisor_of(engine).server.is_alive) == (0, False)
    engine.set_resident(True)
    assert engine.wait_serving(False) is True
    assert {len(sample.token_ids) for sample in engine.generate(REQUEST)} == {300}
    assert engine.stats().num_restarts == 1
    kill_server(engine)
    assert engine.wait_serving(True) is False
    assert engine.wait_serving(False) is True


def test_samples_wait_for_a_dead_server_as_long_as_something_else_has_it_to_itself(engine: SglangEngine) -> None:
    with engine.server.exclusive:  # a push that waits for a transport's timeout, say
        generation = engine.generate(REQUEST)
        time.sleep(0.3)
        kill_server(engine)
        time.sleep(4.0)  # longer than three attempts in a row
    assert {len(sample.token_ids) for sample in generation} == {300}
    assert engine.stats().num_restarts == 1


def test_an_engine_is_stopped_at_once_while_its_server_is_being_restarted(engine: SglangEngine, tmp_path: Path) -> None:
    supervisor, launched = supervisor_of(engine), []

    def launch() -> ServerProcess:
        launched.append(ServerProcess([sys.executable, "-c", "import time; time.sleep(60)"], {}, tmp_path / "log"))
        return launched[-1]

    supervisor._launch = launch
    kill_server(engine)
    while not (launched and launched[0].is_alive):
        time.sleep(0.05)
    start = time.monotonic()
    engine.stop()
    assert time.monotonic() - start < 10.0
    assert [server.is_alive for server in launched] == [False], "and nothing is started after the end"


@pytest.mark.parametrize("resident", [False, True])
def test_a_server_found_dead_by_an_offload_is_replaced_by_one_that_is_where_it_should_be(
    engine: SglangEngine, resident: bool
) -> None:
    engine.set_resident(not resident)
    kill_server(engine)
    engine.set_resident(resident)
    assert engine.stats().resident is resident
    assert engine.server.loop.call(engine.client.get("/server_info"))["memory_released"] is not resident
    assert engine.stats().num_restarts == 1


@pytest.mark.parametrize("dies_at", [PauseGeneration, ContinueGeneration, VerifyPush])
def test_a_server_found_dead_around_a_push_comes_back_and_the_push_goes_on(
    engine: SglangEngine, checkpoints: Checkpoints, dies_at: type[PushMessage]
) -> None:
    weights = other_weights(checkpoints.target, 1)

    def deliver(message: PushMessage) -> list[PushReply]:
        if isinstance(message, dies_at):
            kill_server(engine)
        return [engine.update_weights(message)]

    run_push(push_of(weights, 3), deliver, verify=True, pause_mode="retract")
    assert engine.stats().num_restarts == 1
    assert engine.server.loop.call(engine.client.get("/model_info"))["weight_version"] == "3"
    samples = list(engine.generate(REQUEST))
    assert {(len(sample.token_ids), sample.weight_version) for sample in samples} == {(300, 3)}
