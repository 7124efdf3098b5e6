"""The plug-in in an SGLang process: what fits is hooked whole, what does not is named and left alone."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from enum import Enum
from typing import Any

import pytest

from rollout.sglang_engine.plugin import entry
from rollout.sglang_engine.plugin.endpoints import PATHS
from rollout.sglang_engine.plugin.fit import misfit
from rollout.sglang_engine.plugin.hooks import Contract, Feature, Hook, Name
from rollout.sglang_engine.plugin.metadata import COMPLETION
from rollout.sglang_engine.plugin.state import OFF, STATE, Detail, State

HERE = "tests.sglang.test_plugin_hooks"


class Parent:
    selector: str = "all"

    def inherited(self, obj: object, request: object = None) -> None: ...


class Manager(Parent):
    def __init__(self) -> None:
        self.is_paused = False

    def update(self, recv_req: object) -> None: ...

    @property
    def is_free(self) -> bool:
        return not self.is_paused and self.session is None  # type: ignore[attr-defined]


class Algorithm(Enum):
    EAGLE = 1

    def is_standalone(self) -> bool:
        return False


def hooked(*arguments: Any) -> None: ...


def hook(target: str, *parameters: str, **options: Any) -> Hook:
    return Hook(Name(f"{HERE}.{target}", parameters), "around", options.pop("process", "scheduler"), hooked, **options)


UPDATE = hook("Manager.update", "self", "recv_req")
INHERITED = hook("Manager.inherited", "self", "obj", "request", process="main")
OLD = hook("Manager.update", "self", "old_request")
FEATURE = Feature("weights", "does", (Contract("2.0", (UPDATE, INHERITED)),))


def choose(*features: Feature, process: str = "main", off: str = "") -> tuple[list[Hook], State]:
    state = State(process=process, sglang="9.9")
    return entry.choose(features, state, {OFF: off}, {HERE}), state


def test_a_name_fits_by_all_its_parameters_and_a_class_by_the_members_used() -> None:
    assert misfit(UPDATE.name) is None
    assert misfit(INHERITED.name) is None
    assert misfit(Name(f"{HERE}.Manager", members=("selector", "update", "inherited"))) is None
    assert misfit(Name(f"{HERE}.Manager", attributes=("is_paused", "session"))) is None
    assert misfit(Name(f"{HERE}.Algorithm", members=("EAGLE", "is_standalone"))) is None


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (OLD.name, "Manager.update takes (self, recv_req) instead of (self, old_request)"),
        (hook("Manager.gone", "self").name, "Manager.gone is missing"),
        (Name("no_such_package.module.function"), "no_such_package.module.function is missing"),
        (Name(f"{HERE}.Manager", members=("selector", "session")), "Manager has no session"),
        (Name(f"{HERE}.Manager", attributes=("is_paused", "renamed")), "Manager has no renamed"),
    ],
)
def test_a_name_that_looks_otherwise_is_told_in_words(name: Name, says: str) -> None:
    assert says in (misfit(name) or "")


def test_the_first_contract_that_fits_is_hooked() -> None:
    older = Contract("1.0", (OLD,))
    hooks, state = choose(replace(FEATURE, contracts=(older, *FEATURE.contracts)))
    assert hooks == [UPDATE, INHERITED]
    assert (state.active, state.inactive) == ({"weights": "2.0"}, {})


def test_a_release_that_fits_no_contract_has_nothing_hooked_and_one_loud_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hooks, state = choose(replace(FEATURE, contracts=(Contract("1.0", (INHERITED, OLD)),)))
    assert hooks == []
    (error,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert "weights is NOT active: SGLang 9.9" in error
    assert "as of 1.0: tests.sglang.test_plugin_hooks.Manager.update takes (self, recv_req)" in error
    assert "\n" not in error
    assert state.shown("main")["inactive"].keys() == {"weights"}
    assert state.shown("main")["active"] == []


def test_a_feature_fails_alone() -> None:
    misfitting = Feature("other", "does", (Contract("1.0", (OLD,)),))
    hooks, state = choose(misfitting, FEATURE)
    assert hooks == [UPDATE, INHERITED]
    assert (list(state.active), list(state.inactive)) == (["weights"], ["other"])


@pytest.mark.parametrize("off", ["all", "weights", " weights , other"])
def test_the_environment_turns_features_off(off: str, caplog: pytest.LogCaptureFixture) -> None:
    hooks, state = choose(FEATURE, Feature("other", "does", ()), off=off)
    assert hooks == []
    assert state.inactive["weights"] == f"turned off by {OFF}"
    assert "active=nothing" in caplog.messages[-1]


def test_a_name_in_the_environment_that_is_no_feature_is_told(caplog: pytest.LogCaptureFixture) -> None:
    hooks, _ = choose(FEATURE, off="weight")
    assert hooks == [UPDATE, INHERITED]
    assert f"{OFF} names weight; known are all, weights" in caplog.messages[0]


def test_each_process_says_once_what_is_active(caplog: pytest.LogCaptureFixture) -> None:
    choose(FEATURE, process="scheduler")
    assert caplog.messages == ["slime_spec plug-in: process=scheduler sglang=9.9 active=weights (as of 2.0)"]


def test_a_scheduler_takes_its_own_hooks_and_main_takes_all() -> None:
    assert choose(FEATURE, process="scheduler")[0] == [UPDATE]
    assert choose(FEATURE, process="main")[0] == [UPDATE, INHERITED]


def test_a_module_that_this_process_has_not_loaded_is_neither_imported_nor_hooked() -> None:
    of_http = Hook(Name("no_http_server.set_state", ("state",), only_where_loaded=True), "before", "main", hooked)
    needed = Name("no_http_server.State", members=("shown",), only_where_loaded=True)
    hooks, state = choose(Feature("info", "does", (Contract("2.0", (of_http, UPDATE), (needed,)),)))
    assert hooks == [UPDATE]
    assert list(state.active) == ["info"]


def test_the_process_is_known_by_who_loads_plug_ins() -> None:
    def run_scheduler_process() -> str:
        return entry.this_process()

    def run_detokenizer_process() -> str:
        return entry.this_process()

    assert (run_scheduler_process(), run_detokenizer_process(), entry.this_process()) == (
        "scheduler",
        "detokenizer",
        "main",
    )


def test_the_entry_point_imports_nothing_heavy_and_nothing_of_ours_beside_the_plug_in() -> None:
    code = "import sys; from rollout.sglang_engine.plugin.entry import activate; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    ours = {name for name in loaded if name.partition(".")[0] in ("rollout", "slime_spec", "trainer_bridge")}
    assert not {"torch", "ray", "transformers", "numpy", "aiohttp", "sglang"} & set(loaded)
    assert {name for name in ours if not name.startswith("rollout.sglang_engine.plugin")} == {
        "rollout",
        "rollout.sglang_engine",
        "slime_spec",
    }


def test_every_contract_hooks_a_name_once_and_with_its_parameters() -> None:
    for feature in entry.FEATURES:
        for contract in feature.contracts:
            targets = [hook.name.target for hook in contract.hooks]
            assert len(set(targets)) == len(targets)
            assert all(hook.name.parameters for hook in contract.hooks)


def test_the_main_process_shows_what_it_counts_and_a_scheduler_what_it_does() -> None:
    """The server's dict is filled once, at its start, and shown at each request."""
    counts = {"pushes": 0}
    details = {"push": Detail("main", lambda: counts), "kept": Detail("scheduler", lambda: {"num_kept": 0})}
    active = {"push": "2.0", "kept": "2.0"}
    state = State(process="main", active=active, details=details)  # as a forked scheduler has it, too
    main, scheduler = state.shown("main"), state.shown("scheduler")
    counts["pushes"] += 1
    assert (main["push"], "kept" in main) == ({"pushes": 1}, False)
    assert (scheduler["kept"], "push" in scheduler) == ({"num_kept": 0}, False)


def test_what_the_main_process_counts_is_in_the_servers_dict() -> None:
    shows = {name: detail for name, detail in STATE.details.items() if detail.process == "main"}
    assert {name: detail.show() for name, detail in shows.items()} == {
        "metadata": COMPLETION.counts,
        "endpoints": PATHS.shown,
    }
    assert shows["metadata"].show() is COMPLETION.counts
    assert shows["endpoints"].show() is PATHS.shown


def test_a_feature_that_is_left_out_late_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    state = State(sglang="9.9", active={"weights": "2.0"})
    for _ in range(2):
        state.leave_out("weights", "no runners")
    assert (state.active, state.inactive) == ({}, {"weights": "no runners"})
    (line,) = caplog.messages
    assert "weights is NOT active: SGLang 9.9" in line
