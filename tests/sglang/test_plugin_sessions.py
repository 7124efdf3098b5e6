"""Sessions that the plug-in opens for clients that know none, on stand-ins: what closes them, when, on which ranks."""

from __future__ import annotations

import asyncio
import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import distributed

from rollout.sglang_engine.plugin.draft_safe import DraftSafeUpdates, with_sessions
from rollout.sglang_engine.plugin.drafts import OF_THE_TARGET, OWN
from rollout.sglang_engine.plugin.sessions import DEFAULT_SESSION_S, SESSION_S, LazySession, session_s
from rollout.sglang_engine.plugin.state import State
from tests.support.plugged_scheduler import LONG_S, Server, watch
from tests.support.sglang_updaters import MESSAGES, Hooked, Model, Newer, Runner


def opened(server: Server) -> Server:
    assert server.send("tensor", selector="all").success
    assert server.updates.session.is_open
    return server


def test_the_first_bucket_opens_a_session_for_all_buckets_and_continuing_closes_it() -> None:
    server = opened(Server(True, OWN))
    server.send("tensor", selector="all")
    assert server.target.calls == ["begin"]
    server.scheduler.continue_generation(SimpleNamespace())
    assert (server.target.calls, server.draft.calls) == (["begin", "end"], [])
    assert server.updater._session is None
    assert server.updates.shown() == {
        "draft": OWN,
        "session": {"is_open": False, "num_opened": 1, "closed_by": {"continue_generation": 1}},
    }


def test_an_mtp_heads_session_is_the_drafts_too() -> None:
    server = opened(Server(True, OF_THE_TARGET))
    server.scheduler.continue_generation(SimpleNamespace())
    assert (server.target.calls, server.draft.calls) == (["begin", "end"], ["begin", "end"])


@pytest.mark.parametrize(
    ("reason", "call"),
    [
        ("flush_cache", lambda server: server.scheduler.flush_cache()),
        ("generate", lambda server: server.scheduler.handle_generate_request(SimpleNamespace())),
        ("error", lambda server: server.send_failing()),
        ("release_memory_occupation", lambda server: server.updater.release_memory_occupation(SimpleNamespace())),
        ("another update", lambda server: server.send("disk", model_path="/new")),
        ("begin_weight_update", lambda server: server.updater.begin_weight_update(SimpleNamespace(selector="target"))),
    ],
)
def test_what_needs_whole_weights_closes_the_session_first(reason: str, call: Any) -> None:
    server = opened(Server(True, OWN))
    call(server)
    assert server.updates.session.closed_by == {reason: 1}
    assert server.target.calls[:2] == ["begin", "end"]


def test_a_paused_scheduler_queues_requests_within_a_session() -> None:
    server = opened(Server(True, OWN))
    server.scheduler._engine_paused = True
    server.scheduler.handle_generate_request(SimpleNamespace())
    assert server.updates.session.is_open


def test_a_bucket_that_fails_closes_the_session_and_the_next_one_opens_another(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = opened(Server(True, OWN))
    server.updater.fails = True
    assert not server.send("tensor", selector="all").success
    assert server.updater._session is None
    assert "reason=error" in caplog.messages[-1]
    server.updater.fails = False
    opened(server)
    assert server.updates.session.num_opened == 2


@pytest.mark.parametrize("selector", ["target", "draft"])
def test_a_client_with_sessions_and_sides_is_left_as_it_is(selector: str) -> None:
    server = Server(True, OF_THE_TARGET)
    server.updater.begin_weight_update(SimpleNamespace(selector=selector))
    server.send("tensor", selector=selector)
    server.scheduler.flush_cache()
    assert server.updater._session == selector
    server.updater.end_weight_update(SimpleNamespace(rid=None))
    assert server.updates.session.shown() == {"is_open": False, "num_opened": 0, "closed_by": {}}
    changed = (server.target, server.draft) if selector == "target" else (server.draft, server.target)
    assert changed[0].calls == ["begin", "end"]
    assert changed[1].calls == []
    assert set(changed[0].model.weights.values()) == {1}
    assert set(changed[1].model.weights.values()) == {0}


def test_in_a_clients_session_for_all_a_draft_of_its_own_is_kept_too() -> None:
    server = Server(True, OWN)
    server.updater.begin_weight_update(SimpleNamespace(selector="all"))
    assert server.send("tensor", selector="all").success
    server.updater.end_weight_update(SimpleNamespace(rid=None))
    assert server.loaded == ({"embed": 1, "layer": 1}, {"embed": 0, "mtp": 0})
    assert server.draft.calls == ["begin", "end"]


def test_a_draft_named_without_a_session_gets_sglangs_own_refusal() -> None:
    server = opened(Server(True, OWN))
    assert not server.send("tensor", selector="draft").success
    assert server.draft.model.weights == {"embed": 0, "mtp": 0}


def _update_on_rank(rank: int, failing: int, place: str, told: Any) -> None:
    if distributed.is_initialized():  # this process's parent has a group of its own
        distributed.destroy_process_group()
    distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    target = Runner(Model("embed"), "/target")
    updater = Newer(target, None, distributed.group.WORLD)
    updates = DraftSafeUpdates(LazySession(lambda: MESSAGES, lambda: False), State())
    hooked = Hooked(with_sessions(updates, watch(LONG_S))).add("SchedulerWeightUpdaterManager", updater)
    request = SimpleNamespace(weights=[("embed", 1)], selector="all")
    assert hooked.update_weights_from_distributed(request).success
    updater.fails = rank == failing
    output = hooked.update_weights_from_distributed(request)
    distributed.barrier()  # the next request, which SGLang brings to all ranks
    told.put((rank, output.success, output.message, updates.session.closed_by, target.calls))


def test_what_one_rank_did_not_load_closes_the_session_of_all_and_every_rank_says_so(tmp_path: Path) -> None:
    """Closing is for all ranks at once: one that closes alone waits for the others, which wait for a request."""
    forked = multiprocessing.get_context("fork")  # a new interpreter would import for as long as all else here takes
    told = forked.Queue()
    ranks = [
        forked.Process(target=_update_on_rank, args=(rank, 1, str(tmp_path / "meet"), told), daemon=True)
        for rank in range(2)
    ]
    for each in ranks:
        each.start()
    closed = (False, "not loaded", {"error": 1}, ["begin", "end"])
    assert sorted(told.get(timeout=60.0) for _ in ranks) == [(0, *closed), (1, *closed)]
    for each in ranks:
        each.join()


@pytest.mark.parametrize(
    "call",
    [
        lambda server: server.scheduler.handle_generate_request(SimpleNamespace()),
        lambda server: server.scheduler.flush_cache(),
    ],
)
def test_with_dp_attention_what_a_group_of_ranks_does_alone_closes_no_session(call: Any) -> None:
    """The other ranks are not there to close theirs, and closing waits for them."""
    server = opened(Server(True, OWN))
    server.in_groups = True
    call(server)
    assert server.updates.session.is_open
    server.scheduler.continue_generation(SimpleNamespace())
    assert not server.updates.session.is_open


# The clock


class Manager:
    """A tokenizer manager before the scheduler of ``server``."""

    def __init__(self, server: Server, is_pause: bool = False) -> None:
        self._server, self.is_pause = server, is_pause
        self.sent: list[str] = []
        self.expired = asyncio.Event()

    async def update(self, obj: Any) -> Any:
        return self._server.send("tensor", selector="all")

    async def end_weight_update_communicator(self, request: Any) -> None:
        await asyncio.sleep(0)  # the way to the schedulers and back
        self._server.updater.end_weight_update(request)
        self.sent.append("close")
        self.expired.set()

    async def send_one_request(self, obj: str) -> None:
        self.sent.append(obj)


def test_a_client_that_dies_half_way_has_its_session_closed(caplog: pytest.LogCaptureFixture) -> None:
    async def dies() -> Server:
        server = Server(True, OWN)
        manager = Manager(server)
        await watch(0.001).watched(Manager.update, manager, SimpleNamespace())
        await manager.expired.wait()
        return server

    server = asyncio.run(dies())
    assert server.updates.session.closed_by == {"timeout": 1}
    assert server.updater._session is None
    assert "reason=timeout" in caplog.messages[-1]


def test_each_bucket_starts_the_clock_anew() -> None:
    async def two_buckets() -> list[bool]:
        server = Server(True, OWN)
        manager, clock = Manager(server), watch(LONG_S)
        await clock.watched(Manager.update, manager, SimpleNamespace())
        first = clock._timer
        await clock.watched(Manager.update, manager, SimpleNamespace())
        assert first is not None
        assert clock._timer is not None
        return [first.cancelled(), clock._timer.cancelled()]

    assert asyncio.run(two_buckets()) == [True, False]


def test_the_clock_closes_no_clients_session() -> None:
    async def takes_over() -> Server:
        server = Server(True, OWN)
        manager = Manager(server)
        await watch(0.001).watched(Manager.update, manager, SimpleNamespace())
        server.updater.begin_weight_update(SimpleNamespace(selector="target"))
        await manager.expired.wait()
        return server

    server = asyncio.run(takes_over())
    assert server.updater._session == "target"
    assert server.updates.session.closed_by == {"begin_weight_update": 1}


async def two_requests_after_a_bucket(manager: Manager, in_groups: bool) -> list[str]:
    clock = watch(LONG_S, in_groups)
    await clock.watched(Manager.update, manager, SimpleNamespace())
    requests = (clock.before_request(Manager.send_one_request, manager, name) for name in ("first", "second"))
    await asyncio.gather(*requests)
    await clock.before_request(Manager.send_one_request, manager, "third")
    return manager.sent


def test_with_dp_attention_the_session_is_closed_on_all_ranks_before_the_first_request_goes_on() -> None:
    server = Server(True, OWN)
    sent = asyncio.run(two_requests_after_a_bucket(Manager(server), in_groups=True))
    assert sent == ["close", "first", "second", "third"]
    assert server.updates.session.closed_by == {"generate": 1}


@pytest.mark.parametrize(("in_groups", "is_pause"), [(False, False), (True, True)])
def test_requests_that_reach_all_ranks_or_find_a_pause_need_nothing_before_them(
    in_groups: bool, is_pause: bool
) -> None:
    server = Server(True, OWN)
    sent = asyncio.run(two_requests_after_a_bucket(Manager(server, is_pause), in_groups))
    assert sent == ["first", "second", "third"]
    assert server.updates.session.is_open


def test_a_clock_that_cannot_ask_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody awaits what a clock does."""

    async def renamed() -> None:
        server = Server(True, OWN)
        manager, clock = SimpleNamespace(is_pause=False, _server=server, sent=[]), watch(LONG_S, True)
        await clock.watched(Manager.update, manager, SimpleNamespace())
        await clock.before_request(Manager.send_one_request, manager, "served all the same")
        assert manager.sent == ["served all the same"]

    asyncio.run(renamed())
    assert "could not close a session of weight updates reason=generate" in caplog.messages[-1]
    assert "end_weight_update_communicator" in caplog.text


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "inf"])
def test_a_time_that_is_none_is_told_and_the_default_used(text: str, caplog: pytest.LogCaptureFixture) -> None:
    assert session_s({SESSION_S: text}) == DEFAULT_SESSION_S
    assert f"{SESSION_S}='{text}'" in caplog.messages[0]


def test_a_time_may_be_set() -> None:
    assert (session_s({SESSION_S: "2.5"}), session_s({})) == (2.5, DEFAULT_SESSION_S)
