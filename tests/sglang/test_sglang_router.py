"""The way through a router: what goes through it, what does not, and whose samples they are."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from rollout.sglang_engine.engine import SglangEngine
from rollout.sglang_engine.fake import FakeServer, serving
from rollout.sglang_engine.launcher import Launcher
from rollout.sglang_engine.router import RoutedRequests
from rollout.sglang_engine.router_process import RouterProcess, behind_router, router_command
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.sglang.arguments import Place, config_of_engine, server_flags
from slime_spec.sglang.interpreter import checked_in, installed_in
from slime_spec.sglang.labels import engine_number, label_suffix, version_number
from slime_spec.site import Site
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams
from slime_spec.weights.run import run_push
from tests.sglang.conftest import Checkpoints, Connect, rows_of
from tests.support.pushes import DirectTransport, other_weights, push_of
from tests.support.sglang_real import cpu_environment, sglang_python

ROOT = Path(__file__).resolve().parents[2]


def group(name: str, num_samples: int = 2, num_tokens: int = 20) -> GroupRequest:
    return GroupRequest(name, (5, 6, 7), tuple(range(num_samples)), SamplingParams(max_new_tokens=num_tokens))


@dataclass(frozen=True)
class Routed:
    """Two engines on fake servers behind the real router, which sends requests in turn to one and the other."""

    router: RouterProcess
    engines: tuple[SglangEngine, SglangEngine]
    servers: tuple[FakeServer, FakeServer]

    def workers(self) -> list[str]:
        server = self.engines[0].server
        assert isinstance(server.requests, RoutedRequests)
        servers = server.loop.call(server.requests._servers())
        return sorted(server["url"] for server in servers)

    def generate(self, engine: int, request: GroupRequest) -> list[GeneratedSample]:
        return list(self.engines[engine].generate(request))


def with_router(config: Config, **server: Any) -> Config:
    settings = replace(config.sglang_server, router=True, **server)
    return replace(config, rollout=replace(config.rollout, num_engines=2), sglang_server=settings)


@pytest.fixture
def routed(config: Config) -> Iterator[Routed]:
    with ExitStack() as stack:
        stack.enter_context(cpu_environment())
        servers = (FakeServer(delay_s=0.005), FakeServer(delay_s=0.005))
        for server in servers:
            server.rows = rows_of(Path(config.model.hf_checkpoint))
        addresses = tuple(stack.enter_context(serving(server)) for server in servers)
        wanted = with_router(config, python=sglang_python(), router_args=("--policy", "round_robin"))
        router = RouterProcess(wanted, installed_in(sglang_python()), "127.0.0.1", "127.0.0.1")
        router.start()
        stack.callback(router.stop)
        router.wait_until_ready()
        settings = replace(
            config.sglang_server, external_addrs=addresses, router_addr=router.address, start_timeout_s=30.0
        )
        behind = replace(wanted, sglang_server=settings)
        engines = (SglangEngine(behind, 0, DirectTransport()), SglangEngine(behind, 1, DirectTransport()))
        for engine in engines:
            engine.start()
            stack.callback(engine.stop)
        for server in servers:
            server.calls.clear()
        yield Routed(router, engines, servers)


@pytest.mark.sglang_server
def test_requests_go_through_the_router_and_control_calls_to_each_engines_own_server(
    routed: Routed, checkpoints: Checkpoints
) -> None:
    assert len(routed.workers()) == 2
    samples = routed.generate(0, group("a", 4)) + routed.generate(1, group("b", 4))
    # In turn to both, whichever engine asked; each is told of the server that generated it, and no token is doubled.
    assert sorted(sample.engine for sample in samples) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert {len(sample.token_ids) for sample in samples} == {20}
    for index, server in enumerate(routed.servers):
        assert len(server.told("/generate")) == 4 == sum(sample.engine == index for sample in samples)
    messages = push_of(other_weights(checkpoints.target, 1), 3)
    run_push(messages, lambda message: [routed.engines[1].update_weights(message)])
    assert [len(server.told("/update_weights_from_tensor")) > 0 for server in routed.servers] == [False, True]
    after = routed.generate(0, group("c", 2))
    assert {(sample.engine, sample.weight_version) for sample in after} == {(0, 0), (1, 3)}
    assert routed.engines[1].stats().weight_version == 3

    # An abort reaches the sample on whichever server it is, and no other sample.
    generation = routed.engines[0].generate(group("long", 2, 400))
    time.sleep(0.2)  # the router has sent one to each server
    other = routed.engines[1].generate(group("other", 2, 60))
    time.sleep(0.1)
    generation.abort()
    aborted = list(generation)
    assert {sample.finish_reason for sample in aborted} == {"abort"}
    assert {sample.engine for sample in aborted} == {0, 1}
    assert all(0 < len(sample.token_ids) < 400 for sample in aborted)
    assert {sample.finish_reason for sample in other} == {"length"}

    # One engine's server leaves: the other's alone generates. Without a router at all each engine's own does.
    routed.engines[1].stop()
    assert len(routed.workers()) == 1
    assert {sample.engine for sample in routed.generate(0, group("d", 4))} == {0}
    routed.router.stop()
    assert {(sample.engine, len(sample.token_ids)) for sample in routed.generate(0, group("e"))} == {(0, 20)}


def test_what_was_said_of_the_router_is_not_asked_of_the_engines_behind_it(config: Config, tmp_path: Path) -> None:
    overrides = tmp_path / "overrides.yaml"
    overrides.write_text("{0: {mem_fraction_static: 0.7}}")
    wanted = with_router(config, overrides=str(overrides), router_args=("--policy", "random"))
    behind = config_of_engine(behind_router(wanted, "127.0.0.1:1"), 0)
    assert behind.sglang_server.router_addr == "127.0.0.1:1"
    assert behind.sglang["mem_fraction_static"] == 0.7


@pytest.mark.sglang_server
def test_a_server_that_is_restarted_behind_the_router_is_entered_again_and_no_sample_is_lost(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cpu_environment():
        sglang = installed_in(sglang_python())  # asked while its sglang is the real one
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'tests' / 'support' / 'sglang_fake'}{os.pathsep}{ROOT}")
    monkeypatch.setenv("KEY", "secret")
    routing = {"router_args": ("--policy", "round_robin"), "api_key_file": "env:KEY"}
    wanted = with_router(config, python=sglang_python(), **routing)
    with ExitStack() as stack:
        router = RouterProcess(wanted, sglang, "127.0.0.1", "127.0.0.1")
        router.start()
        stack.callback(router.stop)
        settings = replace(wanted.sglang_server, router=False, router_args=(), router_addr=router.address)
        behind = replace(wanted, sglang_server=settings)
        engines = [SglangEngine(behind, index, DirectTransport()) for index in range(2)]
        for engine in engines:
            stack.callback(engine.stop)
            engine.start()
        generations = [engine.generate(group(f"g{index}", 4, 200)) for index, engine in enumerate(engines)]
        time.sleep(0.4)
        supervisor = engines[1].server.supervisor
        assert supervisor is not None
        assert supervisor.server._process is not None
        for child in psutil.Process(supervisor.server._process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGKILL)
        samples = [sample for generation in generations for sample in generation]
        assert [len(sample.token_ids) for sample in samples] == [200] * 8
        deadline = time.monotonic() + 30
        while not engines[1].stats().num_restarts and time.monotonic() < deadline:
            time.sleep(0.1)
        again = [sample for engine in engines for sample in engine.generate(group("again", 2))]
        assert sorted(sample.engine for sample in again) == [0, 0, 1, 1]


def test_a_router_needs_its_package_beside_sglang(config: Config) -> None:
    with pytest.raises(ConfigError, match="pip install sglang-router"):
        RouterProcess(with_router(config), checked_in(), "127.0.0.1", "127.0.0.1")


def test_a_router_sends_nothing_twice_and_listens_nowhere_but_where_it_must(config: Config) -> None:
    wanted = with_router(config, router_args=("--policy", "random"))
    line = " ".join(router_command(wanted, "python", "::1", 30001, 30002))
    for expected in (
        "python -m sglang_router.launch_router --host ::1 --port 30001 --prometheus-host ::1 --prometheus-port 30002",
        "--disable-retries --disable-circuit-breaker --disable-health-check",
        "--policy random",
    ):
        assert expected in line
    router = RouterProcess(with_router(config), replace(checked_in(), router_version="0.3.2"), "0.0.0.0", "10.0.0.1")
    assert router.address.startswith("10.0.0.1:")


def test_a_routers_flag_that_does_not_exist_ends_the_start_with_its_own_words(config: Config, tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'launch_router.py: error: unrecognized arguments: --polisy'\nexit 2\n")
    fake.chmod(0o755)
    wanted = with_router(config, python=str(fake))
    router = RouterProcess(wanted, replace(checked_in(), router_version="0.3.2"), "127.0.0.1", "127.0.0.1")
    router.start()
    with pytest.raises(ConfigError, match=r"(?s)its router must start.*unrecognized arguments: --polisy"):
        router.wait_until_ready()
    router.stop()


@pytest.mark.parametrize(
    ("label", "version", "engine"), [("3@12", 3, 12), ("3", 3, None), ("default", 0, None), (None, 0, None)]
)
def test_a_label_tells_the_version_and_the_engine(label: str | None, version: int, engine: int | None) -> None:
    assert (version_number(label), engine_number(label)) == (version, engine)


@pytest.mark.parametrize("label", ["step-100", "", "3@", "@1", "3@1@2", " 3", "-1", "²", "9" * 5000, 3])
def test_a_label_that_this_run_has_not_given_has_no_version(label: object) -> None:
    for read in (version_number, engine_number):
        with pytest.raises(ValueError, match="which this run has not given"):
            read(label)


def test_only_behind_a_router_weights_are_called_by_their_engine(config: Config) -> None:
    assert label_suffix(config, 1) == ""
    assert label_suffix(with_router(config), 1) == "@1"
    found = replace(config, sglang_server=replace(config.sglang_server, router_addr="10.0.0.1:3000"))
    assert label_suffix(found, 0) == "@0"
    assert server_flags(found, 0, Place("127.0.0.1", 30000))["weight_version"] == "0@0"


def test_a_router_that_cannot_take_the_server_is_told_in_time(connect: Connect) -> None:
    """The fake server is no router: it has no /workers."""
    engine = connect(FakeServer()).engine
    with serving(FakeServer()) as address:
        routed = RoutedRequests(engine.server.open(f"http://{address}"), engine.client, engine.client.url, None)
        with pytest.raises(ConfigError, match=r"must take the server at .* within 0\.5 s"):
            engine.server.loop.call(routed.enter(0.5))


def test_a_server_that_cannot_name_its_weights_is_not_put_behind_a_router(config: Config) -> None:
    known = checked_in()
    old = replace(known, flags={dest: flag for dest, flag in known.flags.items() if dest != "weight_version"})
    with pytest.raises(ConfigError, match="needs a server that names its weights' version"):
        Launcher(with_router(config), 0, old, Site())
    Launcher(config, 0, old, Site())
