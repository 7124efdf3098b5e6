"""Pushes straight to servers in other processes: every server has what the trainer sent, or what it had before."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import torch
from aiohttp import web

from rollout.sglang_engine.assemble import make_direct
from rollout.sglang_engine.client import SglangClient
from rollout.sglang_engine.direct import ByGroup
from rollout.sglang_engine.engine import SglangEngine
from rollout.sglang_engine.fake import serving
from rollout.sglang_engine.server import ServerProcess
from slime_spec.errors import ConfigError, PushError
from slime_spec.ports import free_port
from slime_spec.transports import server_group
from slime_spec.transports.server_group import LOST, Sent, ServerGroupTransport
from slime_spec.transports.server_ipc import ServerIpcTransport
from slime_spec.transports.store import store_on
from slime_spec.transports.to_servers import ServerRoute, ToServers
from slime_spec.types import GroupRequest, SamplingParams
from slime_spec.weights.checksums import tensor_checksum
from slime_spec.weights.messages import BeginPush, CommitPush, PreparePush, PushBucket, PushMessage, Side
from slime_spec.weights.run import PushReport, push_messages, run_push
from tests.sglang.conftest import Checkpoints, Connect, eagle3_config
from tests.support.fake_receiver import FakeReceiver
from tests.support.push_engines import Fault, quiet, to_all

ROOT = Path(__file__).resolve().parents[2]
BUCKET_BYTES = 20_000
WAYS = [ServerGroupTransport, ServerIpcTransport]


class ReceiverLauncher:
    """Starts FakeReceivers as processes, in place of a Launcher."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port("127.0.0.1")
        self.url = self.reachable_url = f"http://127.0.0.1:{self._port}"
        self.reachable_host = "127.0.0.1"

    def server(self, speculate: bool) -> ServerProcess:
        command = [sys.executable, "-m", "tests.support.fake_receiver", "--port", str(self._port)]
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return ServerProcess(command, environment, self._folder / f"server-{self._port}.log")


@dataclass
class Trainer:
    """One rank that pushes, and the engines that it pushes to."""

    transport: ToServers
    engines: list[SglangEngine]

    def push(
        self,
        weights: dict[str, torch.Tensor],
        version: int,
        side: Side = "target",
        before: Fault = quiet,
        after: Fault = quiet,
        **options: Any,
    ) -> PushReport:
        messages = push_messages(weights, version, side, BUCKET_BYTES, self.transport, len(self.engines))
        try:
            return run_push(messages, to_all(self.engines, before, after), **options)
        finally:
            messages.close()

    @property
    def group(self) -> object:
        """The rank's end of its group; None where there is no group."""
        return getattr(self.transport, "_sender", None)

    def shown(self, engine: SglangEngine, side: Side) -> dict[str, str]:
        """The checksums of the tensors that the engine's server has received."""
        sums = engine.server.loop.call(engine.weights.delivery.checksums(side))
        return {name: each for name, each in sums.items() if "of_the_checkpoint" not in name}

    def check(self, weights: dict[str, torch.Tensor], version: int, side: Side = "target") -> None:
        """Every server has the weights, under their version."""
        sums = {f"0:{name}": f"{tensor_checksum(tensor):x}" for name, tensor in weights.items()}
        for engine in self.engines:
            engine.server.loop.call(engine.server.until_ready())
            assert self.shown(engine, side) == sums
            assert engine.weights.version(side) == version
            (sample,) = engine.generate(GroupRequest("group", (5, 6, 7), (0,), SamplingParams(max_new_tokens=4)))
            assert version == (sample.weight_version if side == "target" else sample.draft_version)


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: way.__name__)
def trainer(
    request: pytest.FixtureRequest, checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trainer]:
    """Two engines, each with a server that is a process."""
    folder = tmp_path_factory.mktemp("direct")
    base = eagle3_config(checkpoints, folder)
    config = replace(base, sglang_server=replace(base.sglang_server, max_restarts=50))
    transport = request.param(1)
    engines = [SglangEngine(config, index, type(transport)(1)) for index in range(2)]
    with ExitStack() as stack:
        for engine in engines:
            engine.server._launcher = ReceiverLauncher(folder)  # type: ignore[assignment]
            engine.start()
            stack.callback(engine.stop)
        yield Trainer(transport, engines)
        transport.close()


def target_of(checkpoints: Checkpoints, version: int) -> dict[str, torch.Tensor]:
    return {name: tensor * version for name, tensor in checkpoints.target_weights().items()}


def kill_server(engine: SglangEngine) -> None:
    assert engine.server.supervisor is not None
    process = engine.server.supervisor.server._process
    assert process is not None
    for child in psutil.Process(process.pid).children(recursive=True):
        child.send_signal(signal.SIGKILL)


def test_every_server_has_what_the_rank_sent_push_after_push(trainer: Trainer, checkpoints: Checkpoints) -> None:
    drafts = [trainer.shown(engine, "draft") for engine in trainer.engines]
    for version, dtype in enumerate((torch.float32, torch.bfloat16, torch.float32), start=1):
        weights = {name: tensor.to(dtype) for name, tensor in target_of(checkpoints, version).items()}
        assert trainer.push(weights, version, verify=True).verified
        trainer.check(weights, version)
    assert [trainer.shown(engine, "draft") for engine in trainer.engines] == drafts


def test_a_group_is_made_once_and_anew_when_a_member_was_lost(trainer: Trainer, checkpoints: Checkpoints) -> None:
    weights = target_of(checkpoints, 4)
    trainer.push(weights, 4)
    first = trainer.group
    trainer.push(weights, 5)
    assert trainer.group is first
    kill_server(trainer.engines[1])
    wait_replaced(trainer.engines[1])
    trainer.push(target_of(checkpoints, 6), 6, verify=True)
    assert first is None or trainer.group is not first
    trainer.check(target_of(checkpoints, 6), 6)


def wait_replaced(engine: SglangEngine) -> None:
    supervisor = engine.server.supervisor
    assert supervisor is not None
    num_replaced, deadline = supervisor.num_replaced, time.monotonic() + 60.0
    while supervisor.num_replaced == num_replaced:
        assert time.monotonic() < deadline, "nobody replaces the server"
        time.sleep(0.05)


def test_a_draft_goes_the_same_way_and_the_target_stays(trainer: Trainer, checkpoints: Checkpoints) -> None:
    weights, draft = target_of(checkpoints, 7), checkpoints.draft_weights()
    trainer.push(weights, 7)
    assert trainer.push(draft, 3, "draft", verify=True).verified
    trainer.check(draft, 3, "draft")
    trainer.check(weights, 7)


def test_a_server_that_replaces_another_gets_what_the_rank_has_kept(trainer: Trainer, checkpoints: Checkpoints) -> None:
    weights = target_of(checkpoints, 8)
    trainer.push(weights, 8)
    kill_server(trainer.engines[0])
    wait_replaced(trainer.engines[0])
    trainer.check(weights, 8)


@pytest.mark.parametrize(
    ("phase", "when"),
    [
        (BeginPush, "after the engine has it"),
        (PushBucket, "before the engine has it"),
        (PreparePush, "after the engine has it"),
    ],
    ids=["BeginPush", "PushBucket", "PreparePush"],
)
def test_a_push_that_one_engine_fails_leaves_every_server_with_the_weights_from_before(
    trainer: Trainer, checkpoints: Checkpoints, phase: type, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other engine's server waits in a broadcast for one that does not come to it."""
    monkeypatch.setattr(server_group, "MEET_TIMEOUT", timedelta(seconds=2))
    monkeypatch.setattr(server_group, "SEND_TIMEOUT", timedelta(seconds=2))
    weights, version = target_of(checkpoints, 9), trainer.engines[0].weights.version("target") + 1
    trainer.push(weights, version)
    raised = False

    def strike(message: PushMessage, index: int) -> BaseException | None:
        nonlocal raised
        if raised or index != 1 or not isinstance(message, phase) or getattr(message, "index", 1) != 1:
            return None
        raised = True
        return PushError("refused")

    with pytest.raises(PushError):
        trainer.push(target_of(checkpoints, 10), version + 1, **{when.partition(" ")[0]: strike})
    trainer.check(weights, version)
    assert trainer.push(target_of(checkpoints, 10), version + 2, verify=True).verified
    trainer.check(target_of(checkpoints, 10), version + 2)


@pytest.mark.parametrize("phase", [PushBucket, CommitPush], ids=lambda phase: phase.__name__)
def test_a_server_that_dies_in_a_push_is_followed_by_one_with_whole_weights(
    trainer: Trainer, checkpoints: Checkpoints, phase: type
) -> None:
    """In a bucket the push fails, and all have the weights from before; in the commit its successor has the push's."""
    weights, version = target_of(checkpoints, 11), trainer.engines[0].weights.version("target") + 1
    trainer.push(weights, version)

    def kill(message: PushMessage, index: int) -> BaseException | None:
        if index == 1 and isinstance(message, phase) and getattr(message, "index", 1) == 1:
            kill_server(trainer.engines[1])
        return None

    other = target_of(checkpoints, 12)
    if phase is CommitPush:
        assert trainer.push(other, version + 1, before=kill, verify=True).verified
        trainer.check(other, version + 1)
        return
    with pytest.raises(PushError, match="did not take the push"):
        trainer.push(other, version + 1, before=kill)
    trainer.check(weights, version)


def test_what_no_number_is_never_leaves_the_rank(trainer: Trainer, checkpoints: Checkpoints) -> None:
    """No engine sees the tensors, so the rank looks at them."""
    weights = target_of(checkpoints, 13)
    version = trainer.engines[0].weights.version("target") + 1
    trainer.push(weights, version)
    spoilt = {name: tensor.clone() for name, tensor in weights.items()}
    first = next(iter(spoilt))
    spoilt[first][3] = float("nan")
    with pytest.raises(PushError, match=rf"{re.escape(first)} \(float32\) holds NaN"):
        trainer.push(spoilt, version + 1)
    trainer.check(weights, version)


def test_a_server_of_other_ranks_than_planned_is_refused_at_the_start(connect: Connect) -> None:
    on_fake = connect()
    with pytest.raises(ConfigError, match=r"servers of 2 ranks, and http://.* has 1"):
        make_direct(ServerIpcTransport(2), 0, on_fake.engine.weights.delivery, on_fake.engine.server)


def test_a_part_of_a_push_never_generates_in_somebody_elses_server(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """It cannot be replaced: it stays paused, whatever the push's pause, until it has a whole push."""
    base, server = eagle3_config(checkpoints, tmp_path), FakeReceiver()
    with serving(server) as address:
        settings = replace(base.sglang_server, external_addrs=(address,))
        config = replace(base, run=replace(base.run, mode="train"), sglang_server=settings)
        engine = SglangEngine(config, 0, ServerIpcTransport(1))
        trainer = Trainer(ServerIpcTransport(1), [engine])
        engine.start()
        try:
            trainer.push(target_of(checkpoints, 2), 1, pause_mode="retract")
            server.odd = {"/update_weights_from_tensor": [web.json_response({"message": "no"}, status=400)]}
            with pytest.raises(PushError, match=r"did not take the push: .* was refused"):
                trainer.push(target_of(checkpoints, 3), 2, pause_mode="retract")
            assert not server._going.is_set()
            assert engine.weights.version("target") == 1
            trainer.push(target_of(checkpoints, 4), 3, pause_mode="retract", verify=True)
            assert server._going.is_set()
            trainer.check(target_of(checkpoints, 4), 3)
        finally:
            engine.stop()


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_server_that_stays_leaves_the_group_of_a_failed_push_before_it_joins_another(is_replaced: bool) -> None:
    posts: list[tuple[str, str]] = []

    class Client:
        async def post(self, path: str, body: dict[str, Any]) -> None:
            posts.append((path.strip("/").partition("_")[0], body["group_name"]))

    transport, client = ServerGroupTransport(1), cast(SglangClient, Client())
    way, store = ByGroup(transport, 1), store_on("127.0.0.1", 2, timedelta(seconds=5))
    for group in ("first", "second"):
        transport.routes = (ServerRoute("push", transport.kept, group, "127.0.0.1", store.port, 2),)
        bucket = PushBucket(1, 0, (), (), (Sent(group, "gloo"),))
        asyncio.run(way.load(client, bucket, {}))
        asyncio.run(way.load(client, bucket, {}))
        if group == "first":
            assert not store.check([LOST])
            way.forget(is_replaced)
            assert store.check([LOST])  # and the rank makes another group
    left = [] if is_replaced else [("destroy", "first")]
    joined = [[("init", group), ("update", group), ("update", group)] for group in ("first", "second")]
    assert posts == [*joined[0], *left, *joined[1]]
