"""Weight updates of clients that name no side, on stand-ins for SGLang's updaters: what lands in which model."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rollout.sglang_engine.plugin.drafts import NONE, OF_THE_TARGET, OWN, UNKNOWN, Draft
from tests.support.plugged_scheduler import FIELDS, Server
from tests.support.sglang_updaters import Model, RenamedDraftWorker, Runner, SeveralLayers

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


def test_an_mtp_heads_checkpoint_stays_the_one_that_the_server_was_started_with() -> None:
    server = Server(True, OF_THE_TARGET)
    server.send("disk", model_path="/new")
    assert (server.target.model_config.model_path, server.draft.model_config.model_path) == ("/new", "/new")
    assert server.updates.draft.known == Draft(OF_THE_TARGET, "/target")


@pytest.mark.parametrize("origin", ["tensor", "distributed", "disk"])
def test_a_draft_with_runners_under_an_unknown_name_is_told_and_left_to_sglang(
    origin: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Taken for no draft, an MTP head would go stale in silence."""
    server, as_it_is = Server(False, OF_THE_TARGET), Server(False, OF_THE_TARGET, plugin=False)
    for each in (server, as_it_is):
        each.updater.draft_worker = RenamedDraftWorker(each.target, each.draft)
    if origin == "disk":
        for each in (server, as_it_is):
            each.updater.draft_worker.update_weights_from_disk = each.draft.from_disk
    for _ in range(2):
        assert server.send(origin, **FIELDS[False][origin]).success
    as_it_is.send(origin, **FIELDS[False][origin])
    assert server.loaded == as_it_is.loaded
    (error,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert "weights is NOT active" in error
    assert "RenamedDraftWorker has its model runners under no known name" in error
    assert (server.state.active, list(server.state.inactive)) == ({}, ["weights"])
    assert server.updates.shown()["draft"] == UNKNOWN


def test_from_sessions_on_no_session_is_opened_for_an_unknown_draft() -> None:
    server = Server(True, OF_THE_TARGET)
    server.updater.draft_worker = RenamedDraftWorker(server.target, server.draft)
    assert not server.send("tensor", selector="all").success
    assert server.updates.session.num_opened == 0


def test_n_grams_have_no_runners_and_that_is_known() -> None:
    server = Server(False, NONE, algorithm="NGRAM")
    server.updater.draft_worker = SimpleNamespace()
    server.send("distributed")
    assert (server.updates.shown()["draft"], server.state.inactive) == (NONE, {})


def test_a_model_that_drafts_for_itself_is_no_part_of_the_target() -> None:
    server = Server(True, OF_THE_TARGET, algorithm="STANDALONE")
    server.send("tensor", selector="all")
    assert (server.updates.shown()["draft"], server.draft.model.weights) == (OWN, {"embed": 0, "mtp": 0})


def test_a_link_to_the_targets_folder_is_the_targets_folder(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    server = Server(True, OWN)
    server.target.model_config.model_path = str(tmp_path / "target")
    server.draft.model_config.model_path = str(tmp_path / "link")
    assert server.updates.draft.of(server.updater) == Draft(OF_THE_TARGET, str(tmp_path / "target"))


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
