"""A scheduler of stand-ins with the plug-in's hooks, of both contracts, and the requests that clients send to it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from rollout.sglang_engine.plugin.draft_safe import DraftSafeUpdates, with_sessions, without_sessions
from rollout.sglang_engine.plugin.drafts import NONE, OF_THE_TARGET, OWN
from rollout.sglang_engine.plugin.sessions import LazySession, Watch
from rollout.sglang_engine.plugin.state import State
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
)

SENT = [("embed", 1), ("layer", 1), ("mtp", 1)]
LONG_S = 3600.0


def told_by_one(problem: str, group: Any) -> list[str]:
    """What all ranks tell where there is one."""
    return [problem] if problem else []


def watch(after_s: float, in_groups: bool = False) -> Watch:
    return Watch(after_s, lambda: MESSAGES, lambda: in_groups)


class Server:
    """A scheduler with its models, of one contract, with the plug-in or as it is."""

    in_groups = False  # with DP attention

    def __init__(self, newer: bool, kind: str, plugin: bool = True, algorithm: str = "EAGLE") -> None:
        self.target = Runner(Model("embed", "layer"), "/target", algorithm)
        self.draft = Runner(Model("embed", "mtp", dies=kind == OWN), "/target" if kind == OF_THE_TARGET else "/draft")
        worker: Any = (NewerDraftWorker if newer else DraftWorker)(self.target, self.draft)
        updater: Any = (Newer if newer else Older)(self.target, None if kind == NONE else worker)
        self.state = State(active={"weights": "of these stand-ins"})
        session = LazySession(lambda: MESSAGES, lambda: self.in_groups)
        self.updates = DraftSafeUpdates(session, self.state, told_by_one)
        contract = with_sessions(self.updates, watch(LONG_S)) if newer else without_sessions(self.updates)
        hooked = Hooked(contract)
        self.updater = hooked.add("SchedulerWeightUpdaterManager", updater) if plugin else updater
        self.scheduler = hooked.add("Scheduler", Scheduler(updater)) if plugin and newer else Scheduler(updater)

    def send(self, origin: str, weights: Any = SENT, **fields: Any) -> Any:
        request = SimpleNamespace(weights=weights, **fields)
        return getattr(self.updater, f"update_weights_from_{origin}")(request)

    def send_failing(self) -> Any:
        self.updater.fails = True
        return self.send("tensor", selector="all")

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
