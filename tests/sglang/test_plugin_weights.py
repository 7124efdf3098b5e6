"""Weight updates of clients that name no side, on stand-ins for SGLang's updaters: what lands in which model."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rollout.sglang_engine.plugin.draft_safe import DraftSafeUpdates, with_sessions, without_sessions
from rollout.sglang_engine.plugin.drafts import NONE, OF_THE_TARGET, OWN
from rollout.sglang_engine.plugin.sessions import DEFAULT_SESSION_S, SESSION_S, LazySession, Watch, session_s
from tests.support.sglang_updaters import (
    MESSAGES,
    DraftWorker,
    Hooked,
    Model,
    Newer,
    NewerDraftWorker,
    Older,
    Runner,
    Scheduler,
    SeveralLayers,
)

SENT = [("embed", 1), ("layer", 1), ("mtp", 1)]
LONG_S = 3600.0


class Server:
    """A scheduler with its models, of one contract, with the plug-in or as it is."""

    def __init__(self, newer: bool, kind: str, plugin: bool = True, algorithm: str = "EAGLE") -> None:
        self.target = Runner(Model("embed", "layer"), "/target", algorithm)
        self.draft = Runner(Model("embed", "mtp", dies=kind == OWN), "/target" if kind == OF_THE_TARGET else "/draft")
        worker: Any = (NewerDraftWorker if newer else DraftWorker)(self.target, self.draft)
        updater: Any = (Newer if newer else Older)(self.target, None if kind == NONE else worker)
        self.updates = DraftSafeUpdates(LazySession(lambda: MESSAGES))
        contract = (
            with_sessions(self.updates, Watch(LONG_S, lambda: MESSAGES)) if newer else without_sessions(self.updates)
        )
        hooked = Hooked(contract)
        self.updater = hooked.add("SchedulerWeightUpdaterManager", updater) if plugin else updater
        self.scheduler = hooked.add("Scheduler", Scheduler(updater)) if plugin and newer else Scheduler(updater)

    def send(self, origin: str, weights: Any = SENT, **fields: Any) -> Any:
        request = SimpleNamespace(weights=weights, **fields)
        return getattr(self.updater, f"update_weights_from_{origin}")(request)

    @property
    def loaded(self) -> tuple[dict[str, int], dict[str, int]]:
        return self.target.model.weights, self.draft.model.weights


FIELDS: dict[bool, dict[str, dict[str, Any]]] = {
    True: {
        "tensor": {"selector": "all"},
        "distributed": {"selector": "all"},
        "disk": {"model_path": "/new"},
        "ipc": {"model_path": "/new"},
    },
    False: {
        "tensor": {"disable_draft_model": None},
        "distributed": {},
        "disk": {"model_path": "/new"},
        "ipc": {"model_path": "/new"},
    },
}
CASES = [(newer, origin) for newer in (True, False) for origin in FIELDS[newer]]
every_way = pytest.mark.parametrize(("newer", "origin"), CASES)


@every_way
def test_a_draft_with_weights_of_its_own_is_neither_loaded_nor_killed(newer: bool, origin: str) -> None:
    server = Server(newer, OWN)
    assert server.send(origin, **FIELDS[newer][origin]).success
    assert server.loaded == ({"embed": 1, "layer": 1}, {"embed": 0, "mtp": 0})
    assert server.updater.draft_worker is not None


@every_way
def test_an_mtp_head_of_the_targets_checkpoint_takes_part(newer: bool, origin: str) -> None:
    server = Server(newer, OF_THE_TARGET)
    assert server.send(origin, **FIELDS[newer][origin]).success
    assert server.loaded == ({"embed": 1, "layer": 1}, {"embed": 1, "mtp": 1})


@every_way
def test_without_a_draft_the_target_takes_updates(newer: bool, origin: str) -> None:
    server = Server(newer, NONE)
    assert server.send(origin, **FIELDS[newer][origin]).success
    assert server.target.model.weights == {"embed": 1, "layer": 1}


@pytest.mark.parametrize(
    ("newer", "origin"), [(newer, origin) for newer, origin in CASES if (newer, origin) != (False, "distributed")]
)
def test_without_the_plug_in_the_same_updates_fail(newer: bool, origin: str) -> None:
    server = Server(newer, OWN, plugin=False)
    if newer and origin in ("tensor", "distributed"):
        assert not server.send(origin, **FIELDS[newer][origin]).success
    else:
        with pytest.raises(AssertionError, match="org_vocab_size"):
            server.send(origin, **FIELDS[newer][origin])


def test_a_folder_that_was_loaded_does_not_make_a_draft_part_of_the_target() -> None:
    """Where the draft's folder is loaded as the target, the two paths are the same from then on."""
    server = Server(True, OWN)
    server.send("disk", model_path="/draft")
    assert server.send("tensor", selector="all").success
    assert server.draft.model.weights == {"embed": 0, "mtp": 0}


def test_a_model_that_drafts_for_itself_is_no_part_of_the_target() -> None:
    server = Server(True, OF_THE_TARGET, algorithm="STANDALONE")
    server.send("tensor", selector="all")
    assert (server.updates.draft.known, server.draft.model.weights) == (OWN, {"embed": 0, "mtp": 0})


def test_a_link_to_the_targets_folder_is_the_targets_folder(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    server = Server(True, OWN)
    server.target.model_config.model_path = str(tmp_path / "target")
    server.draft.model_config.model_path = str(tmp_path / "link")
    assert server.updates.draft.of(server.updater) == OF_THE_TARGET


@pytest.mark.parametrize("origin", ["tensor", "distributed"])
def test_before_sessions_every_layer_of_an_mtp_head_takes_part(origin: str) -> None:
    """0.5.20 leaves the layers out of broadcasts, and has no way to bring them tensors."""
    server = Server(False, OF_THE_TARGET)
    layers = [Runner(Model(f"mtp{i}"), "/target") for i in range(2)]
    server.updater.draft_worker = SeveralLayers(*layers)
    server.send(origin, [("layer", 2), ("mtp0", 3), ("mtp1", 4)], **FIELDS[False][origin])
    assert server.target.model.weights["layer"] == 2
    assert [layer.model.weights for layer in layers] == [{"mtp0": 3}, {"mtp1": 4}]
    assert "load_weights" not in vars(server.target.model)


def test_before_sessions_a_client_that_leaves_the_draft_out_is_left_as_it_is() -> None:
    server = Server(False, OF_THE_TARGET)
    server.send("tensor", disable_draft_model=True)
    assert server.loaded == ({"embed": 1, "layer": 1}, {"embed": 0, "mtp": 0})


class WithHead(Model):
    """A model with an output head; a target's is loaded."""

    def __init__(self, head: torch.Tensor) -> None:
        super().__init__("embed")
        self.lm_head = SimpleNamespace(weight=torch.nn.Parameter(head))

    def get_embed_and_head(self) -> tuple[None, torch.nn.Parameter]:
        return None, self.lm_head.weight

    def load_weights(self, weights: Any) -> None:
        for name, value in weights:
            if name == "lm_head":
                self.lm_head.weight.data.copy_(value)


@pytest.mark.parametrize("newer", [True, False])
@pytest.mark.parametrize("kind", [OWN, OF_THE_TARGET])
@pytest.mark.parametrize("origin", ["tensor", "distributed"])
@pytest.mark.parametrize(("algorithm", "renewed"), [("EAGLE", True), ("EAGLE3", False)])
def test_a_head_of_rows_copied_from_the_targets_is_renewed(
    newer: bool, kind: str, origin: str, algorithm: str, renewed: bool
) -> None:
    """EAGLE with a map of frequent tokens; EAGLE-3's map is of a head of its own."""
    rows, was, is_now = torch.tensor([0, 3]), torch.zeros(5, 2), torch.arange(10.0).reshape(5, 2)
    server = Server(newer, kind, algorithm=algorithm)
    server.target.model = WithHead(was.clone())
    server.draft.model = copied = WithHead(was[rows])
    copied.load_weights = lambda weights: None  # type: ignore[method-assign]
    server.updater.draft_worker.draft_worker.hot_token_id = rows
    server.send(origin, [("lm_head", is_now)], **FIELDS[newer][origin])
    assert torch.equal(server.target.model.lm_head.weight, is_now)
    expected = torch.tensor([[0.0, 1.0], [6.0, 7.0]]) if renewed else was[rows]
    assert torch.equal(copied.lm_head.weight, expected)


# Sessions


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


# The clock


class Manager:
    """A tokenizer manager before the scheduler of ``server``."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.expired = asyncio.Event()

    async def update(self, obj: Any) -> Any:
        return self._server.send("tensor", selector="all")

    async def end_weight_update_communicator(self, request: Any) -> None:
        self._server.updater.end_weight_update(request)
        self.expired.set()


def test_a_client_that_dies_half_way_has_its_session_closed(caplog: pytest.LogCaptureFixture) -> None:
    async def dies() -> Server:
        server = Server(True, OWN)
        manager, watch = Manager(server), Watch(0.001, lambda: MESSAGES)
        await watch.watched(Manager.update, manager, SimpleNamespace())
        await manager.expired.wait()
        return server

    server = asyncio.run(dies())
    assert server.updates.session.closed_by == {"timeout": 1}
    assert server.updater._session is None
    assert "reason=timeout" in caplog.messages[-1]


def test_each_bucket_starts_the_clock_anew() -> None:
    async def two_buckets() -> list[bool]:
        server = Server(True, OWN)
        manager, watch = Manager(server), Watch(LONG_S, lambda: MESSAGES)
        await watch.watched(Manager.update, manager, SimpleNamespace())
        first = watch._timer
        await watch.watched(Manager.update, manager, SimpleNamespace())
        assert first is not None
        assert watch._timer is not None
        return [first.cancelled(), watch._timer.cancelled()]

    assert asyncio.run(two_buckets()) == [True, False]


def test_the_clock_closes_no_clients_session() -> None:
    async def takes_over() -> Server:
        server = Server(True, OWN)
        manager, watch = Manager(server), Watch(0.001, lambda: MESSAGES)
        await watch.watched(Manager.update, manager, SimpleNamespace())
        server.updater.begin_weight_update(SimpleNamespace(selector="target"))
        await manager.expired.wait()
        return server

    server = asyncio.run(takes_over())
    assert server.updater._session == "target"
    assert server.updates.session.closed_by == {"begin_weight_update": 1}


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "inf"])
def test_a_time_that_is_none_is_told_and_the_default_used(text: str, caplog: pytest.LogCaptureFixture) -> None:
    assert session_s({SESSION_S: text}) == DEFAULT_SESSION_S
    assert f"{SESSION_S}='{text}'" in caplog.messages[0]


def test_a_time_may_be_set() -> None:
    assert (session_s({SESSION_S: "2.5"}), session_s({})) == (2.5, DEFAULT_SESSION_S)
