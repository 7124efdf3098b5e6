"""What the plug-in is for: the same servers without it, driven as slime does, refuse, die, or keep a stale MTP head."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import requests

from tests.support.sglang_real import Models
from tests.support.slime_way import SlimeServer, Stored, arguments, launched_by_slime

pytestmark = [
    pytest.mark.long,
    pytest.mark.sglang_server,
    pytest.mark.proves("tests.support.sglang_cpu"),
]
PINNED, OLDER = "", "0.5.20"
DIES_S = 60.0


def dies(server: SlimeServer) -> bool:
    deadline_s = time.monotonic() + DIES_S
    while server.process.is_alive and time.monotonic() < deadline_s:
        time.sleep(0.2)
    return not server.process.is_alive and "org_vocab_size" in server.log()


def test_from_0_5_21_tensors_are_refused_and_a_folder_ends_the_server(models: Models, tmp_path: Path) -> None:
    stored = Stored.make(models.target, tmp_path / "other")
    with launched_by_slime(arguments(models, "EAGLE3", tmp_path), tmp_path, PINNED, plugin=False) as server:
        assert "slime_spec_plugin" not in server.info()
        before = server.checksums()
        server.pause_and_flush()
        refused = server.send_tensors(stored.other.weights)
        assert (refused.status_code, "begin_weight_update" in refused.text) == (400, True)
        assert server.checksums() == before
        with pytest.raises(requests.ConnectionError):
            server.load_folder(stored.other.folder)
        assert dies(server)


def test_up_to_0_5_20_tensors_end_the_server(models: Models, tmp_path: Path) -> None:
    stored = Stored.make(models.target, tmp_path / "other")
    with launched_by_slime(arguments(models, "EAGLE3", tmp_path), tmp_path, OLDER, plugin=False) as server:
        server.pause_and_flush()
        with pytest.raises(requests.ConnectionError):
            server.send_tensors(stored.other.weights)
        assert dies(server)


def test_up_to_0_5_20_broadcasts_leave_an_mtp_head_stale(models: Models, tmp_path: Path) -> None:
    stored = Stored.make(models.mimo, tmp_path / "other")
    with launched_by_slime(arguments(models, "NEXTN", tmp_path), tmp_path, OLDER, plugin=False) as server:
        before = server.checksums()
        server.update("group", stored.other, "1")
        after = server.checksums()
    unchanged = {name for name in before if after[name] == before[name]}
    assert unchanged
    assert all(name.startswith("draft.") for name in unchanged)
