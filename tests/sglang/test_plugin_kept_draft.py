"""A draft is kept while its memory is given away; on stand-ins for SGLang's, whose memory saver loses what it has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rollout.sglang_engine.plugin.kept_draft import KeptDraft
from rollout.sglang_engine.plugin.state import State
from tests.support.served_draft import Updater, equal


def lose(updater: Updater) -> None:
    with torch.no_grad():
        for tensor in (*updater.draft.parameters(), updater.draft.hot_token_id):
            tensor.zero_()


def release_and_resume(updater: Updater, tags: list[str] | None) -> KeptDraft:
    request, kept = SimpleNamespace(tags=tags), KeptDraft()
    kept.keep(lambda updater, recv_req: lose(updater), updater, request)
    kept.put_back(lambda updater, recv_req: None, updater, request)
    return kept


@pytest.mark.parametrize("tags", [None, [], ["weights"], ["kv_cache", "weights"]])
def test_a_draft_is_as_it_was_after_its_memory_was_given_away(updater: Updater, tags: list[str] | None) -> None:
    before = updater.draft.state()
    kept = release_and_resume(updater, tags)
    assert kept.shown() == {"num_kept": 1, "num_put_back": 1}
    assert equal(updater.draft.state(), before)
    assert updater.draft.hot_token_id.tolist() == [0, 1, 2]
    assert not updater.target.weight.any(), "the target is the trainer's to push"


def test_a_second_release_keeps_the_copy_of_the_first(updater: Updater) -> None:
    before, request, kept = updater.draft.state(), SimpleNamespace(tags=None), KeptDraft()

    def release(updater: Updater, recv_req: Any) -> None:
        lose(updater)
        updater.offload_tags.add("weights")

    for _ in range(2):
        kept.keep(release, updater, request)
    kept.put_back(lambda updater, recv_req: updater.offload_tags.clear(), updater, request)
    assert equal(updater.draft.state(), before)


def test_a_draft_under_an_unknown_name_is_not_kept_and_that_is_told(
    updater: Updater, caplog: pytest.LogCaptureFixture
) -> None:
    state = State(active={"kept_draft": "of these stand-ins"})
    kept, released = KeptDraft(state), []
    updater.draft_worker = SimpleNamespace()
    kept.keep(lambda updater, recv_req: released.append(recv_req), updater, SimpleNamespace(tags=None))
    assert (len(released), kept.num_kept, state.active, list(state.inactive)) == (1, 0, {}, ["kept_draft"])
    assert "kept_draft is NOT active" in caplog.messages[-1]


def test_memory_without_weights_and_servers_that_give_none_away_need_no_copy(updater: Updater) -> None:
    for tags, is_enabled in ((["kv_cache"], True), (None, False)):
        updater.memory_saver_adapter.enabled = is_enabled
        assert release_and_resume(updater, tags).num_kept == 0
