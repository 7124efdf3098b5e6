"""Every call that a push makes of a server, and the server dead or hanging at it: the push ends well all the same.

The server's successor has the weights of the push, or those before it; no sample is lost; no run ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from aiohttp import web

from rollout.sglang_engine import canary, delivery, server
from rollout.sglang_engine.engine import SglangEngine
from rollout.sglang_engine.fake import FakeServer, next_token
from rollout.sglang_engine.fake_http import Body, State
from rollout.sglang_engine.generation import SglangGeneration
from slime_spec.errors import PushError
from slime_spec.types import GroupRequest, SamplingParams
from slime_spec.weights.checksums import tensor_checksum
from slime_spec.weights.messages import Side
from slime_spec.weights.run import PushReport, run_push
from tests.sglang.conftest import Checkpoints, Connect, eagle3_config
from tests.support.fake_processes import UPDATES, ChecksumServer, FakeLauncher, engine_on_fakes, loaded
from tests.support.pushes import push_of

PAUSE, CONTINUE = "/pause_generation", "/continue_generation"
BEGIN, END = "/begin_weight_update", "/end_weight_update"
VERSION, SUMS, ROWS, CANARY = "/model_info", "/weights_checker", "/get_weights_by_name", "/generate"
HANG_S = 0.1  # after which a call is given up, where a server hangs: too early a replacement would do no harm
PROMPT, NUM_TOKENS = (5, 6, 7), 150
SIDES: tuple[Side, ...] = ("target", "draft")


@dataclass(frozen=True)
class Phase:
    """A call of a push: the ``nth`` of its path."""

    path: str
    nth: int = 1

    def __str__(self) -> str:
        return f"{self.path.strip('/')}-{self.nth}"


LOADING = (Phase(BEGIN), Phase(UPDATES, 1), Phase(UPDATES, 2), Phase(END))
# What a push calls, in order, by side and pause.
CALLS: dict[tuple[Side, str], tuple[Phase, ...]] = {
    ("target", "none"): (
        Phase(PAUSE),
        *LOADING,
        Phase(CONTINUE),
        Phase(VERSION),
        Phase(SUMS, 1),
        Phase(CANARY),
        *(Phase(ROWS, nth) for nth in (1, 2, 3, 4)),
        Phase(SUMS, 2),
    ),
    ("target", "in_place"): (
        Phase(PAUSE),
        *LOADING,
        Phase(VERSION),
        *(Phase(ROWS, nth) for nth in (1, 2, 3, 4)),
        Phase(SUMS, 1),
        Phase(CONTINUE),
        Phase(SUMS, 2),
        Phase(CANARY),
    ),
    ("draft", "none"): (
        Phase(PAUSE),
        *LOADING,
        Phase(CONTINUE),
        Phase(SUMS, 1),
        Phase(SUMS, 2),
        Phase(CANARY),
        Phase(SUMS, 3),
    ),
}
TABLE = [
    (side, pause, phase)
    for (side, pause), phases in CALLS.items()
    for phase in phases
    if phase.path != ROWS or phase.nth in (1, 4)
]


@dataclass
class Run:
    """An engine on fakes that goes on through the whole table; ``versions`` are those that it was last pushed."""

    engine: SglangEngine
    launcher: FakeLauncher
    weights: dict[Side, dict[str, torch.Tensor]]
    versions: dict[Side, int]

    def push(self, side: Side, pause: str = "none") -> PushReport:
        version = self.versions[side] = self.versions[side] + 1
        scaled = {name: tensor * version for name, tensor in self.weights[side].items()}
        # Two buckets: the last one brings the version and the flush.
        sizes = [tensor.nbytes for tensor in scaled.values()]
        self.engine.weights.delivery._bucket_bytes = sum(sizes[:-1])
        messages = push_of(scaled, version, side)
        return run_push(messages, lambda each: [self.engine.update_weights(each)], verify=True, pause_mode=pause)

    def begin_sample(self) -> SglangGeneration:
        """Begin a sample and wait for its first token: a part without tokens would be followed by a second's wait."""
        request = GroupRequest("group", PROMPT, (1,), SamplingParams(max_new_tokens=NUM_TOKENS))
        generation = self.engine.generate(request)
        deadline = time.monotonic() + 30.0
        while (running := set(self.engine.samples.in_progress)) and not any(sample.num_tokens for sample in running):
            assert time.monotonic() < deadline, "no token comes"
            time.sleep(0.001)
        return generation

    @property
    def server(self) -> FakeServer:
        """The server that serves: a slow machine's server may be replaced once more than it must be."""
        deadline = time.monotonic() + 30.0
        while self.launcher.servers[-1].state != "serves":
            assert time.monotonic() < deadline, "nobody replaces the server"
            time.sleep(0.01)
        self.engine.server.loop.call(self.engine.server.until_ready())
        return self.launcher.servers[-1]

    def check_weights(self) -> None:
        """The server has the weights that were last pushed, of both sides, under their versions."""
        for side, tensors in self.weights.items():
            version = self.versions[side]
            expected = {name: tensor_checksum(tensor * version) for name, tensor in tensors.items()}
            assert loaded(self.server, side) == expected
            assert self.engine.weights.version(side) == version
        assert self.server.weight_version == str(self.versions["target"])


class Aborting(ChecksumServer):
    """Aborts all that it generates, by itself, at the first call of ``at``."""

    at = ""

    async def _body(self, request: web.Request) -> Body:
        if request.path == self.at:
            self.at = ""
            for aborted in self._running.values():
                aborted.set()
        return await super()._body(request)


@pytest.fixture(scope="module")
def run(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    config = eagle3_config(checkpoints, tmp_path_factory.mktemp("run"))
    settings = replace(config.sglang_server, canary_prompts=1, canary_tokens=8, max_restarts=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delivery, "ASK_AGAIN_S", (0.0, 0.01))
        patch.setattr(canary, "LONGEST_S", HANG_S)
        patch.setattr(server, "POLL_S", 0.02)
        make = partial(Aborting, delay_s=0.003)
        engine, launcher = engine_on_fakes(replace(config, sglang_server=settings), make)
        engine._watch.canary.waits_s = ()
        weights: dict[Side, dict[str, torch.Tensor]] = {
            "target": checkpoints.target_weights(),
            "draft": checkpoints.draft_weights(),
        }
        run = Run(engine, launcher, weights, {"target": 0, "draft": 0})
        list(run.begin_sample())
        run.push("target")
        run.push("draft")
        yield run
        engine.stop()


def whole_sample() -> tuple[int, ...]:
    """What the fake's model says to PROMPT."""
    ids = [PROMPT[-1]]
    for position in range(NUM_TOKENS):
        ids.append(next_token(ids[-1], len(PROMPT) + position))
    return tuple(ids[1:])


@pytest.mark.parametrize(("side", "pause"), CALLS, ids=str)
def test_the_table_has_every_call_of_a_push(run: Run, side: Side, pause: str) -> None:
    serving = run.server
    serving.heard.clear()
    run.push(side, pause)
    assert serving.heard == [phase.path for phase in CALLS[side, pause]]


@pytest.mark.parametrize("state", ["dead", "hangs"])
@pytest.mark.parametrize(("side", "pause", "phase"), TABLE, ids=str)
def test_a_push_whose_server_is_lost_at_any_call_ends_with_its_weights_on_the_successor(
    run: Run,
    side: Side,
    pause: str,
    phase: Phase,
    state: State,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cases sglang/01-hang and sglang/02-dies-in-commit."""
    before = run.server
    # A sample of a server that hangs goes on a second later: not in every row, for the time it takes.
    samples = [run.begin_sample()] if state == "dead" or (side, pause) == ("target", "none") else []
    before.fail(phase.path, phase.nth, state)
    if state == "hangs":
        supervisor = run.engine.server.supervisor
        assert supervisor is not None
        monkeypatch.setattr(run.engine.client, "_call_timeout_s", HANG_S)
        monkeypatch.setattr(supervisor, "_settings", replace(supervisor._settings, stall_timeout_s=HANG_S))
    num_replaced = run.engine.stats().num_restarts
    run.push(side, pause)
    assert run.engine.stats().num_restarts > num_replaced, "the push does not end before its server is replaced"
    assert run.server is not before
    run.check_weights()
    assert [sample.token_ids for group in samples for sample in group] == [whole_sample()] * len(samples)
    assert "ALARM" not in caplog.text


ODD = {
    "refused": lambda: web.json_response({"error": {"message": "no"}}, status=400),
    "busy": lambda: web.json_response({"error": {"message": "the queue is full"}}, status=429),
    "failed": lambda: web.Response(text="Internal Server Error", status=500),
    "text": lambda: web.Response(text="hello"),
    "empty": web.Response,
    "null": lambda: web.json_response(None),
    "list": lambda: web.json_response([{"ranks": None}]),
    "object": lambda: web.json_response({"text": "", "meta_info": {"finish_reason": {}}}),
    "aborted": lambda: web.json_response(
        {"meta_info": {"finish_reason": {"type": "abort"}, "weight_version": None}, "ranks": [None]}
    ),
}


@pytest.mark.parametrize("path", [VERSION, SUMS, CANARY, ROWS])
@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_an_odd_answer_after_the_weights_were_loaded_does_not_end_the_push(
    run: Run, path: str, odd: Callable[[], web.Response], caplog: pytest.LogCaptureFixture
) -> None:
    """Case sglang/06-canary-refused, and the same of every other call that only looks at what was pushed."""
    server = run.server
    run.engine._watch.canary.waits_s = (0.0,)
    for side in SIDES if path in (SUMS, CANARY) else SIDES[:1]:
        server.odd[path] = [odd()]
        run.push(side)
        assert server.odd.pop(path) == [], "it was asked for"
        assert run.server is server
        run.check_weights()
        counted = run.engine.stats().canary
        assert counted.num_correct == 2 * counted.num_rounds > 0, "asked again"
    assert "ALARM" not in caplog.text


@pytest.mark.parametrize(
    "phase", [Phase(UPDATES, 2), Phase(CONTINUE), Phase(VERSION), Phase(SUMS), Phase(ROWS, 3)], ids=str
)
def test_an_external_server_that_dies_in_a_push_ends_it_with_an_error_that_names_the_server(
    connect: Connect, checkpoints: Checkpoints, phase: Phase
) -> None:
    """Nobody here can start it again, and what it has is unknown."""
    on_fake = connect()
    on_fake.server.fail(phase.path, phase.nth, "dead")
    with pytest.raises(PushError, match=f"external server {on_fake.engine.client.url} cannot be restarted"):
        on_fake.push(push_of(checkpoints.target_weights(), 1, bucket_bytes=200_000), verify=True)


@pytest.mark.parametrize("pause", ["none", "in_place"])
@pytest.mark.parametrize("path", [PAUSE, BEGIN, UPDATES, END, CONTINUE, SUMS])
def test_a_sample_that_the_server_aborts_by_itself_within_a_push_goes_on(run: Run, path: str, pause: str) -> None:
    server = run.server
    assert isinstance(server, Aborting)
    sample = run.begin_sample()
    server.at = path
    run.push("target", pause)
    (arrived,) = sample
    assert (arrived.token_ids, arrived.finish_reason) == (whole_sample(), "length")
    assert run.server is server
    run.check_weights()
