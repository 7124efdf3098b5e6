"""Real servers of three releases, started and driven as slime does, with the plug-in beside them and without.

The target changes whole and the draft in nothing of its own, whichever way the weights come. Once the target is what it
was, the server drafts as it did. The same updates without the plug-in fail.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.sglang_real import CPU, Models, sglang_python
from tests.support.slime_way import (
    SlimeServer,
    Stored,
    arguments,
    buckets,
    launched_by_slime,
    payload,
    plugin_environment,
)

PINNED = ""  # the release of tests/support/sglang_cpu/requirements.txt
RELEASES = ("0.5.20", PINNED, "0.5.23")
SERVERS = [(release, algorithm) for release in RELEASES for algorithm in ("EAGLE3", "EAGLE", "NEXTN")]
SESSION_S = 3.0
WAIT_S = 60.0

pytestmark = [
    pytest.mark.long,
    pytest.mark.sglang_server,
    pytest.mark.proves("rollout.sglang_engine.plugin", "tests.support.sglang_cpu"),
]


@pytest.fixture(scope="module")
def stored(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stored]:
    folder = tmp_path_factory.mktemp("other")
    return {
        algorithm: Stored.make(models.mimo if algorithm == "NEXTN" else models.target, folder / algorithm)
        for algorithm in ("EAGLE3", "EAGLE", "NEXTN")
    }


@pytest.fixture(scope="module", params=SERVERS, ids=lambda param: f"{param[0] or 'pinned'}-{param[1]}")
def served(
    request: pytest.FixtureRequest, models: Models, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[SlimeServer, str]]:
    release, algorithm = request.param
    folder = tmp_path_factory.mktemp("served")
    given = arguments(models, algorithm, folder)
    with launched_by_slime(given, folder, release, SLIME_SPEC_PLUGIN_SESSION_S=str(SESSION_S)) as server:
        yield server, algorithm


@pytest.mark.parametrize("way", ["tensors", "group", "disk"])
def test_the_target_changes_whole_and_of_the_draft_only_what_is_the_targets(
    served: tuple[SlimeServer, str], stored: dict[str, Stored], way: str
) -> None:
    server, algorithm = served
    before, drafted = server.checksums(), server.drafted()
    server.update(way, stored[algorithm].other, "1")
    after = server.checksums()
    assert after.keys() == before.keys()
    changed = {name for name in before if after[name] != before[name]}
    of_target = {name for name in before if not name.startswith("draft.")}
    of_draft = before.keys() - of_target
    shared = {name for name in of_draft if before[name] in {before[each] for each in of_target}}
    assert of_target <= changed
    assert changed - of_target == (of_draft if algorithm == "NEXTN" else shared)
    assert "draft.model.embed_tokens.weight" in shared
    assert {after[name] for name in shared} <= {after[name] for name in of_target}
    assert server.drafted() != drafted

    server.update(way, stored[algorithm].first, "2")
    assert server.checksums() == before
    assert server.drafted() == drafted
    assert drafted.num_accepted > 0


def test_server_info_shows_what_the_plug_in_does(served: tuple[SlimeServer, str], stored: dict[str, Stored]) -> None:
    server, algorithm = served
    server.update("tensors", stored[algorithm].first, "3")
    info = server.info()
    main, scheduler = info["slime_spec_plugin"], info["internal_states"][0]["slime_spec_plugin"]
    assert (main["process"], scheduler["process"]) == ("main", "scheduler")
    assert main["inactive"] == scheduler["inactive"] == {}
    assert {"weights", "info"} <= set(main["active"]) & set(scheduler["active"])
    assert scheduler["weights"]["draft"] == ("part of the target" if algorithm == "NEXTN" else "own weights")
    assert scheduler["weights"]["session"]["is_open"] is False
    assert server.log().count("slime_spec plug-in: process=main") == 1
    assert server.log().count("slime_spec plug-in: process=scheduler") == 1


def test_a_client_that_pauses_nothing_updates_bucket_by_bucket(
    served: tuple[SlimeServer, str], stored: dict[str, Stored]
) -> None:
    """Fields left out are SGLang's defaults: each bucket flushes the cache."""
    server, algorithm = served
    before = server.checksums()
    for bucket in buckets(stored[algorithm].other.weights):
        server.done("update_weights_from_tensor", {"serialized_named_tensors": [payload(bucket)]})
        assert server.session()["is_open"] is False
    changed = {name for name, checksum in server.checksums().items() if checksum != before[name]}
    assert {name for name in before if not name.startswith("draft.")} <= changed
    server.update("tensors", stored[algorithm].first)
    assert server.checksums() == before


def test_a_client_that_dies_half_way_leaves_no_session_open(
    served: tuple[SlimeServer, str], stored: dict[str, Stored]
) -> None:
    server, algorithm = served
    first, *_ = buckets(stored[algorithm].first.weights)
    server.pause_and_flush()
    assert server.send_tensors(first).status_code == 200
    has_sessions = server.info()["version"] != "0.5.20"
    assert server.session()["is_open"] is has_sessions
    deadline_s = time.monotonic() + WAIT_S
    while server.session()["is_open"]:
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    if has_sessions:
        assert server.session()["closed_by"]["timeout"] == 1
    server.update("tensors", stored[algorithm].first, "4")  # the client is started again
    assert server.drafted().num_accepted > 0


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release or "pinned")
@pytest.mark.parametrize("draft_path", ["/draft", "/target"], ids=["own", "mtp"])
def test_sglangs_own_updater_brings_each_way_to_whom_it_is_for(release: str, draft_path: str, tmp_path: Path) -> None:
    """Handles of a checkpoint engine are CUDA's: here it is SGLang's class, on stand-ins for models, that gets them."""
    environment = plugin_environment(tmp_path)
    command = [sglang_python(release), str(CPU / "hooked_updater.py"), "/target", draft_path]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr
    seen = {origin: calls for origin, success, calls in map(json.loads, done.stdout.splitlines()) if success}
    has_sessions, takes_part = release != "0.5.20", draft_path == "/target"
    models = ["target", "draft"] if takes_part else ["target"]
    begins, ends = [[f"{name} {word}" for name in models] if has_sessions else [] for word in ("begins", "ends")]
    loads = [f"{name} loads" for name in models]
    draft_first = list(reversed(loads))
    assert seen == {
        "tensor": begins + (loads if has_sessions else draft_first),
        "distributed": loads,
        "disk": ends + [f"{name} reads the folder" for name in models],
        "ipc": [f"{name} opens the handles" for name in models],
    }
