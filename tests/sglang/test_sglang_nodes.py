"""An engine that is larger than a node: its servers start, die and are replaced together."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from rollout.sglang_engine import launcher
from rollout.sglang_engine.engine import SglangEngine
from rollout.sglang_engine.nodes import NodeProcess, Part, SpannedServer
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.ports import free_port
from slime_spec.site import LOST, NodeLost, Site
from slime_spec.types import GroupRequest, SamplingParams
from tests.support.pushes import DirectTransport

ROOT = Path(__file__).resolve().parents[2]
FAKE = f"{ROOT / 'tests' / 'support' / 'sglang_fake'}{os.pathsep}{ROOT}"
REQUEST = GroupRequest("group", (5, 6, 7), (1, 2), SamplingParams(max_new_tokens=200))


@pytest.fixture
def spanning(config: Config, monkeypatch: pytest.MonkeyPatch) -> Config:
    """An engine of four GPUs on nodes of two each."""
    monkeypatch.setenv("PYTHONPATH", FAKE)
    return replace(
        config,
        rollout=replace(config.rollout, num_gpus_per_engine=4),
        cluster=replace(config.cluster, num_gpus_per_node=2),
        sglang_server=replace(config.sglang_server, max_restarts=2),
    )


@pytest.fixture
def node() -> Iterator[NodeProcess]:
    node = NodeProcess("127.0.0.1", {})
    yield node
    node.stop()


@pytest.fixture
def engine(spanning: Config, node: NodeProcess) -> Iterator[SglangEngine]:
    engine = SglangEngine(spanning, 0, DirectTransport(), Site(others=(node,)))
    engine.start()
    yield engine
    engine.stop()


def server_pids() -> dict[str, int]:
    """Of the fake servers that this process started, by their --node-rank."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            words = process.cmdline()
            if "--node-rank" in words and "guard.py" not in " ".join(words):
                found[words[words.index("--node-rank") + 1]] = process.pid
    return found


def test_the_servers_of_an_engine_find_each_other_and_answer_as_one(
    engine: SglangEngine, spanning: Config, node: NodeProcess
) -> None:
    assert server_pids().keys() == {"0", "1"}
    assert [len(sample.token_ids) for sample in engine.generate(REQUEST)] == [200, 200]
    logs = Path(str(spanning.run.output_dir)) / "engines"
    assert "met 1 as node 0" in (logs / "sglang-0.log").read_text()
    assert "met 1 as node 1" in (logs / "sglang-0-node1.log").read_text()
    engine.stop()
    assert server_pids() == {}
    assert node.exit_code() is not None


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_dies_takes_its_engines_others_with_it_and_no_sample(engine: SglangEngine, rank: str) -> None:
    before = server_pids()
    generation = engine.generate(REQUEST)
    time.sleep(0.2)
    os.kill(before[rank], signal.SIGKILL)
    assert [len(sample.token_ids) for sample in generation] == [200, 200]
    # Where the first node's server lives on, its samples may end before the engine has seen the other's death.
    deadline = time.monotonic() + 30
    while not engine.stats().num_restarts and time.monotonic() < deadline:
        time.sleep(0.1)
    assert engine.stats().num_restarts == 1
    after = server_pids()
    assert after.keys() == {"0", "1"}
    assert not set(after.values()) & set(before.values())
    assert [len(sample.token_ids) for sample in engine.generate(REQUEST)] == [200, 200]


@pytest.mark.parametrize(("num_taken", "starts"), [(2, True), (3, False)])
def test_a_port_that_was_taken_meanwhile_is_chosen_again(
    spanning: Config, node: NodeProcess, monkeypatch: pytest.MonkeyPatch, num_taken: int, starts: bool
) -> None:
    """A rendezvous's port is bound by the server seconds after it was chosen."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        left = [other.getsockname()[1]] * num_taken
        monkeypatch.setattr(
            launcher, "free_port", lambda host, count=1: left.pop() if count > 1 and left else free_port(host, count)
        )
        engine = SglangEngine(spanning, 0, DirectTransport(), Site(others=(node,)))
        with nullcontext() if starts else pytest.raises(ConfigError, match="the port is taken"):
            engine.start()
        assert not left
        if starts:
            assert [len(sample.token_ids) for sample in engine.generate(REQUEST)] == [200, 200]
            assert engine.stats().num_restarts == 0
            engine.stop()
    assert server_pids() == {}


def test_a_node_whose_server_cannot_start_is_told_with_its_own_log(spanning: Config) -> None:
    bare = NodeProcess("127.0.0.1", {"PYTHONPATH": ""})
    engine = SglangEngine(spanning, 0, DirectTransport(), Site(others=(bare,)))
    with pytest.raises(ConfigError, match=r"(?s)ended with exit code 1.*--sglang-python.*on sglang-0-node1\.log:"):
        engine.start()
    assert server_pids() == {}


class GoneNode(NodeProcess):
    """A node that was there when the engine asked for its address."""

    def launch(self, command: Sequence[str], log: Path) -> None:
        raise NodeLost("the node has gone")

    def exit_code(self) -> int | None:
        raise NodeLost("the node has gone")


def test_a_node_that_is_lost_ends_the_start_and_leaves_nothing_behind(spanning: Config) -> None:
    engine = SglangEngine(spanning, 0, DirectTransport(), Site(others=(GoneNode("127.0.0.1", {}),)))
    with pytest.raises(ConfigError, match="the node has gone"):
        engine.start()
    assert server_pids() == {}


def test_a_lost_node_counts_as_the_servers_death(tmp_path: Path) -> None:
    sleeping = ["python3", "-c", "import time; time.sleep(60)"]
    server = SpannedServer(sleeping, {}, tmp_path / "a.log", [])
    server.start()
    assert server.is_alive
    server._others = [Part(GoneNode("127.0.0.1", {}), sleeping, tmp_path / "b.log")]
    assert not server.is_alive
    assert server.exit_code == LOST
    server.stop()
