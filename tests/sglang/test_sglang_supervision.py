"""A server that dies under its engine: what was lost, and what the next one is brought to."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace

import psutil
import pytest

from rollout.sglang_engine.canary import Canary
from rollout.sglang_engine.client import ServerGone, SglangClient
from rollout.sglang_engine.draft_watch import DraftWatch, Verdict
from rollout.sglang_engine.engine import SglangEngine
from rollout.sglang_engine.fake import FakeServer, next_token
from rollout.sglang_engine.loop_thread import AsyncLoop
from rollout.sglang_engine.supervise import EngineFailed
from rollout.sglang_engine.upkeep import Upkeep
from rollout.sglang_engine.weights import Outcome
from slime_spec.config.tree import Config
from slime_spec.errors import PushError
from slime_spec.ports import free_port
from slime_spec.types import GroupRequest, SamplingParams, SpecCounters
from slime_spec.weights.run import run_push
from tests.sglang.conftest import Checkpoints, Connect
from tests.support.pushes import DirectTransport, other_weights, push_of

REQUEST = GroupRequest("group", (5, 6, 7), (1, 2, 3), SamplingParams(max_new_tokens=300))


@pytest.fixture
def engine(config: Config, monkeypatch: pytest.MonkeyPatch, process_path: str) -> Iterator[SglangEngine]:
    """On a fake server that is a process, as SGLang is."""
    monkeypatch.setenv("PYTHONPATH", process_path)
    settings = replace(config.sglang_server, max_restarts=2)
    engine = SglangEngine(replace(config, sglang_server=settings), 0, DirectTransport())
    engine.start()
    yield engine
    engine.stop()


def kill_server(engine: SglangEngine) -> None:
    assert engine.server.supervisor is not None
    process = engine.server.supervisor.server._process
    assert process is not None
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.send_signal(signal.SIGKILL)


def whole(num_tokens: int) -> tuple[int, ...]:
    ids: list[int] = []
    for position in range(num_tokens):
        ids.append(next_token(ids[-1] if ids else 7, 3 + position))
    return tuple(ids)


def test_no_sample_is_lost_and_the_new_server_has_the_current_weights(
    engine: SglangEngine, checkpoints: Checkpoints
) -> None:
    messages = push_of(other_weights(checkpoints.target, 1), 4)
    run_push(messages, lambda message: [engine.update_weights(message)])
    generation = engine.generate(REQUEST)
    time.sleep(0.3)
    kill_server(engine)
    samples = sorted(generation, key=lambda sample: sample.sample_index)
    assert [sample.sample_index for sample in samples] == [0, 1, 2]
    for sample in samples:
        assert sample.token_ids == whole(300)
        assert len(sample.logprobs) == 300
        assert sample.finish_reason == "length"
        assert (sample.weight_version, sample.version_spans) == (4, ())
        assert sample.spec.num_rounds == 0  # nobody knows the rounds of the server that died
    assert engine.server.supervisor is not None
    assert engine.server.supervisor.num_restarts == 1
    assert engine.server.loop.call(engine.client.get("/model_info"))["weight_version"] == "4"


def test_an_abort_while_there_is_no_server_gives_what_had_arrived(engine: SglangEngine) -> None:
    generation = engine.generate(REQUEST)
    time.sleep(0.3)
    kill_server(engine)
    time.sleep(0.1)
    generation.abort()
    samples = list(generation)
    assert len(samples) == 3
    for sample in samples:
        assert sample.finish_reason in ("abort", "length")
        assert sample.token_ids == whole(len(sample.token_ids))


def test_an_engine_whose_server_dies_too_often_fails_its_samples(engine: SglangEngine) -> None:
    assert engine.server.supervisor is not None
    engine.server.supervisor.num_restarts = 2
    generation = engine.generate(REQUEST)
    time.sleep(0.2)
    kill_server(engine)
    with pytest.raises(EngineFailed, match="died 3 times"):
        list(generation)


def test_an_engine_tells_who_waits_when_it_ceases_to_serve_and_when_it_serves_again(engine: SglangEngine) -> None:
    kill_server(engine)
    assert engine.wait_serving(True) is False
    assert engine.wait_serving(False) is True
    told: list[bool] = []
    waiting = threading.Thread(target=lambda: told.append(engine.wait_serving(True)))
    waiting.start()
    engine.stop()
    waiting.join(timeout=10)
    assert told == [True], "nobody waits for an engine that was stopped"


def test_a_server_that_dies_during_a_push_comes_back_with_what_was_pushed(
    engine: SglangEngine, checkpoints: Checkpoints
) -> None:
    messages = push_of(other_weights(checkpoints.target, 1), 1)
    *before, commit = messages
    seen: list[str] = []

    def deliver(message: object) -> list[object]:
        if message is commit:
            kill_server(engine)
        seen.append(type(message).__name__)
        return [engine.update_weights(message)]  # type: ignore[arg-type]

    report = run_push([*before, commit], deliver)  # type: ignore[arg-type]
    assert report.version == 1
    assert engine.stats().num_restarts == 1
    assert engine.server.loop.call(engine.client.get("/model_info"))["weight_version"] == "1"
    assert "CancelPush" not in seen


class Sent:
    """ServerWeights, as far as Upkeep needs them: ``heals`` says that the draft sent again is accepted again."""

    def __init__(self, server: FakeServer, heals: bool) -> None:
        self._server, self._heals = server, heals
        self.num_sent = 0
        self.as_remembered = True
        self.has_pushed_draft, self.knows_draft_sums, self.is_paused = True, True, False
        self.outcome = Outcome()

    def send(self, stage: object) -> Outcome:
        return self.outcome

    def confirm(self, stage: object) -> None:
        pass

    def send_draft_again(self) -> None:
        self.num_sent += 1
        if self._heals:
            self._server.accepted = 2

    def remember_draft(self) -> None:
        self.as_remembered = True

    def draft_is_as_remembered(self) -> bool:
        return self.as_remembered


@dataclass
class Kept:
    """KeptServer, as far as Upkeep needs it; it only notes why it was replaced."""

    client: SglangClient
    loop: AsyncLoop
    speculates: bool = True
    replaced: list[str] = field(default_factory=list)

    def replace(self, why: str) -> None:
        self.replaced.append(why)

    def surviving(self, call: Callable[[], None], loss: str = "") -> None:
        if loss:
            self.replace(loss)
        call()

    async def answers(self) -> bool:
        return await self.client.answers(10.0)


@dataclass
class Tended:
    """An Upkeep on a fake server that has had pushes of nothing."""

    server: FakeServer
    sent: Sent
    kept: Kept
    canary: Canary
    upkeep: Upkeep

    def push(self) -> None:
        self.upkeep.commit(None)  # type: ignore[arg-type]


def tended(connect: Connect, heals: bool, client: SglangClient | None = None) -> Tended:
    server = FakeServer()
    engine = connect(server).engine
    canary = Canary(2, 16, 0.5, longest=100, waits_s=(0.0, 0.0))
    canary.see((1, 2, 3))
    canary.see((4, 5))
    sent, kept = Sent(server, heals), Kept(client or engine.client, engine.server.loop)
    upkeep = Upkeep(kept, sent, DraftWatch(canary, has_weights=True))  # type: ignore[arg-type]
    return Tended(server, sent, kept, canary, upkeep)


GOOD = SpecCounters(num_rounds=4, num_proposed=12, histogram=(0, 0, 4))
BAD = SpecCounters(num_rounds=4, num_proposed=12, histogram=(4,))


def watch(has_weights: bool = True) -> DraftWatch:
    """A watch that has seen drafts accepted."""
    watch = DraftWatch(Canary(1, 8, 0.5, longest=100), has_weights)
    assert watch.judge_canary(GOOD, is_pushed=True, is_proved=False, is_mended=False) is Verdict.FINE
    return watch


@pytest.mark.parametrize(
    ("are_as_remembered", "is_pushed", "verdict"),
    [(True, True, Verdict.FINE), (False, True, Verdict.RESEND), (False, False, Verdict.RESTART)],
)
def test_a_draft_that_was_changed_comes_back_from_where_it_is(
    are_as_remembered: bool, is_pushed: bool, verdict: Verdict
) -> None:
    assert watch().judge_sums(are_as_remembered, is_pushed) is verdict


@pytest.mark.parametrize(
    ("is_pushed", "is_proved", "verdict"),
    [
        (True, False, Verdict.RESEND),
        (True, True, Verdict.RESEND),
        (False, False, Verdict.RESTART),
        (False, True, Verdict.DISABLE),  # the folder has no other draft than the server
    ],
)
def test_a_refused_draft_is_mended_once_and_then_given_up(is_pushed: bool, is_proved: bool, verdict: Verdict) -> None:
    judge = watch().judge_canary
    assert judge(BAD, is_pushed, is_proved, is_mended=False) is verdict
    assert judge(BAD, is_pushed, is_proved, is_mended=True) is Verdict.DISABLE
    assert judge(GOOD, is_pushed, is_proved, is_mended=True) is Verdict.FINE


def test_a_drafter_without_weights_has_nothing_to_mend() -> None:
    assert watch(has_weights=False).judge_canary(BAD, False, False, is_mended=False) is Verdict.DISABLE


def test_nothing_is_judged_of_a_server_that_was_gone_or_verified_nothing() -> None:
    assert watch().judge_canary(None, True, False, is_mended=False) is Verdict.FINE
    assert watch().judge_canary(SpecCounters(), True, False, is_mended=False) is Verdict.FINE


def test_a_draft_that_is_refused_after_a_push_is_sent_again(connect: Connect) -> None:
    on = tended(connect, heals=True)
    on.push()
    assert on.canary.mean == 2.0
    on.server.accepted = 0
    on.push()
    assert (on.sent.num_sent, on.kept.speculates, on.kept.replaced) == (1, True, [])
    assert on.upkeep.num_resends == 1
    assert on.upkeep.counted.num_correct == 2 * on.upkeep.counted.num_rounds > 0, "what the canary counted in the end"


def test_speculation_ends_with_an_alarm_when_that_does_not_help(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    on = tended(connect, heals=False)
    on.push()
    on.server.accepted = 0
    on.push()
    assert (on.sent.num_sent, on.kept.speculates, on.kept.replaced) == (1, False, ["speculation is disabled"])
    assert [record.levelname for record in caplog.records if "ALARM speculation" in record.message] == ["ERROR"]
    assert on.upkeep.counted.num_rounds > on.upkeep.counted.num_correct == 0
    on.push()
    assert on.upkeep.counted.num_rounds == 0, "no canary sings where nothing speculates: the last push has no number"


def test_a_draft_that_somebody_else_changed_is_sent_again_after_the_next_push(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    on = tended(connect, heals=True)
    on.sent.as_remembered = False
    on.push()
    assert (on.sent.num_sent, on.upkeep.num_resends, on.kept.speculates, on.kept.replaced) == (1, 1, True, [])
    assert "ALARM the draft was changed" in caplog.text


def test_no_server_is_restarted_for_a_draft_that_it_still_has(connect: Connect) -> None:
    on = tended(connect, heals=True)
    on.sent.has_pushed_draft = False
    on.push()
    on.server.accepted = 0
    on.push()
    assert (on.sent.num_sent, on.kept.speculates, on.kept.replaced) == (0, False, ["speculation is disabled"])


def test_a_draft_that_only_its_folder_has_comes_back_with_a_new_server(connect: Connect) -> None:
    on = tended(connect, heals=True)
    on.sent.has_pushed_draft, on.sent.as_remembered = False, False
    on.push()
    assert (on.sent.num_sent, on.upkeep.num_resends) == (0, 1)
    assert on.kept.replaced == ["the draft is lost, and only its folder has it"]
    assert on.kept.speculates


@pytest.mark.parametrize("refusal", [None, PushError("engine 0: no")])
def test_a_server_that_was_lost_in_a_push_is_replaced_before_the_push_ends(
    connect: Connect, refusal: PushError | None
) -> None:
    on = tended(connect, heals=True)
    on.sent.outcome = Outcome("it died during the push", refusal)
    with nullcontext() if refusal is None else pytest.raises(PushError, match="engine 0: no"):
        on.push()
    assert on.kept.replaced == ["it died during the push"]
    assert (on.upkeep.counted.num_rounds > 0) is (refusal is None), "a push that was refused is not looked at"


def test_an_external_server_whose_drafts_are_refused_goes_on_under_alarm(
    connect: Connect, checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    on_fake = connect(canary_prompts=2)
    on_fake.generate()
    on_fake.push(push_of(checkpoints.target_weights(), 1))
    on_fake.server.accepted = 0
    on_fake.push(push_of(checkpoints.target_weights(), 2))
    assert on_fake.engine.stats().speculates
    assert "cannot be restarted: speculation is disabled" in caplog.text
    assert {sample.weight_version for sample in on_fake.generate()} == {2}


def test_a_server_that_is_gone_under_the_canary_is_lost_to_the_push_too(connect: Connect) -> None:
    gone = SglangClient(f"http://127.0.0.1:{free_port('127.0.0.1')}")
    on = tended(connect, heals=True, client=gone)
    on.kept.loop.call(gone.open())
    with pytest.raises(ServerGone):  # KeptServer.surviving replaces the server
        on.push()
    on.kept.loop.call(gone.close())
    assert (on.sent.num_sent, on.kept.speculates) == (0, True)


def test_a_draft_pushed_after_speculation_was_given_up_is_only_kept(connect: Connect, checkpoints: Checkpoints) -> None:
    on_fake = connect()
    on_fake.engine.server.speculates = False
    on_fake.push(push_of(checkpoints.draft_weights(), 3, "draft"), verify=True)
    assert on_fake.server.told("/update_weights_from_tensor") == []
    assert on_fake.engine.stats().draft_version == 3


def test_a_small_drop_is_no_alarm_and_moves_the_mean(connect: Connect) -> None:
    on = tended(connect, heals=False)
    on.server.accepted = 3
    on.push()
    on.server.accepted = 2
    on.push()
    assert on.sent.num_sent == 0
    assert on.canary.mean == pytest.approx(0.7 * 3 + 0.3 * 2)


def test_a_draft_lost_in_an_offload_is_sent_again(connect: Connect) -> None:
    on = tended(connect, heals=True)
    on.upkeep.after_offload()
    assert on.sent.num_sent == 0
    on.sent.as_remembered = False
    on.upkeep.after_offload()
    assert on.sent.num_sent == 1


def test_canary_prompts_are_the_first_distinct_ones_that_fit() -> None:
    canary = Canary(2, 8, 0.5, longest=3)
    for prompt in [(1, 2, 3, 4), (1, 2), (1, 2), (3,), (4,)]:
        canary.see(prompt)
    assert canary.prompts == [(1, 2), (3,)]


@pytest.mark.parametrize("pause_mode", ["none", "retract"])
def test_the_engine_tells_what_the_canary_of_its_last_push_counted(
    connect: Connect, checkpoints: Checkpoints, pause_mode: str
) -> None:
    on_fake = connect(canary_prompts=2, canary_tokens=12)
    on_fake.generate()
    assert on_fake.engine.stats().canary.num_rounds == 0
    on_fake.push(push_of(other_weights(checkpoints.target, 1), 1), pause_mode=pause_mode)
    stats = on_fake.engine.stats()
    assert stats.speculates
    assert stats.canary.num_correct == on_fake.server.accepted * stats.canary.num_rounds > 0
