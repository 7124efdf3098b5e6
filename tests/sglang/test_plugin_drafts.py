"""A draft on a server, replaced whole or not at all; on stand-ins for SGLang's."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from rollout.sglang_engine.plugin.draft_push import BEGUN_AND_ENDED, OF_AN_UPDATER, Layout, push
from rollout.sglang_engine.plugin.draft_safe import DraftSafeUpdates
from rollout.sglang_engine.plugin.drafts import NONE, OWN, UNKNOWN, Draft
from rollout.sglang_engine.plugin.new_draft import NotPutBackError, agree, of_folder, replace_draft
from rollout.sglang_engine.plugin.sessions import LazySession
from rollout.sglang_engine.plugin.state import State
from slime_spec.errors import PushError
from tests.sglang.conftest import Checkpoints, own_tensors
from tests.support.served_draft import EMBEDDING, Updater, equal
from tests.support.sglang_real import ROOT


def draft_of(checkpoints: Checkpoints) -> Draft:
    return Draft(OWN, str(checkpoints.eagle3))


def load(runner: Any, tensors: list[tuple[str, torch.Tensor]]) -> None:
    """SGLang's loaders write one tensor after another and raise at what they cannot load."""
    for name, tensor in tensors:
        if name == EMBEDDING:
            runner.model.embed_tokens.weight.data.fill_(0.0)
        else:
            runner.model.own[name.replace(".", "/")].data.copy_(tensor)


def test_a_whole_push_replaces_the_draft(updater: Updater, checkpoints: Checkpoints) -> None:
    new = own_tensors(checkpoints, 1.5)
    assert replace_draft(updater, draft_of(checkpoints), lambda: list(new.items()), load) == len(new)
    assert equal(updater.draft.state(), new)


def test_a_push_never_writes_what_the_draft_shares_with_the_target(
    updater: Updater, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Many drafts' files have a copy of the target's embedding."""
    with_embedding = tmp_path / "with_embedding"
    shutil.copytree(checkpoints.eagle3, with_embedding)
    new = {**own_tensors(checkpoints, 1.5), EMBEDDING: torch.ones(257, 64)}
    save_file(new, with_embedding / "model.safetensors")
    before = updater.target.weight.detach().clone()
    assert replace_draft(updater, Draft(OWN, str(with_embedding)), lambda: list(new.items()), load) == len(new)
    assert torch.equal(updater.target.weight, before)
    assert equal(updater.draft.state(), own_tensors(checkpoints, 1.5))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda new: new.pop("fc.weight"), "lacks fc.weight"),
        (lambda new: new.update(extra=torch.zeros(1)), "does not know: extra"),
        (lambda new: new.update({"fc.weight": torch.zeros(2, 2)}), r"fc.weight has shape \(2, 2\)"),
        (lambda new: new["norm.weight"].fill_(torch.nan), "norm.weight .* NaN"),
        (lambda new: new.update(d2t=torch.zeros(3)), "d2t cannot be pushed"),
    ],
)
def test_what_is_not_the_draft_is_refused_before_anything_is_loaded(
    updater: Updater, checkpoints: Checkpoints, change: Any, says: str
) -> None:
    new = own_tensors(checkpoints, 1.5)
    change(new)

    def loads_nothing(runner: Any, tensors: Any) -> None:
        pytest.fail("a refused push was loaded")

    with pytest.raises(PushError, match=says):
        replace_draft(updater, draft_of(checkpoints), lambda: list(new.items()), loads_nothing)


def test_a_draft_that_breaks_while_it_is_loaded_is_put_back(updater: Updater, checkpoints: Checkpoints) -> None:
    before = updater.draft.state()

    def dies_half_way(runner: Any, tensors: list[tuple[str, torch.Tensor]]) -> None:
        load(runner, tensors[: len(tensors) // 2])
        assert not equal(runner.model.state(), before)
        raise AssertionError("org_vocab_size")

    with pytest.raises(PushError, match="AssertionError: org_vocab_size"):
        replace_draft(
            updater, draft_of(checkpoints), lambda: list(own_tensors(checkpoints, 1.5).items()), dies_half_way
        )
    assert equal(updater.draft.state(), before)


def test_tensors_that_the_load_replaced_are_put_back_by_their_names(updater: Updater, checkpoints: Checkpoints) -> None:
    """SGLang's handling of weights after a load may make new parameters."""
    before = updater.draft.state()

    def replaces(runner: Any, tensors: list[tuple[str, torch.Tensor]]) -> None:
        for name in list(runner.model.own):
            runner.model.own[name] = torch.nn.Parameter(torch.zeros_like(runner.model.own[name]))
        raise AssertionError("packed")

    with pytest.raises(PushError, match="AssertionError: packed") as told:
        replace_draft(updater, draft_of(checkpoints), lambda: list(own_tensors(checkpoints, 1.5).items()), replaces)
    assert not isinstance(told.value, NotPutBackError)
    assert equal(updater.draft.state(), before)


def test_a_draft_that_cannot_be_put_back_is_told_as_lost(updater: Updater, checkpoints: Checkpoints) -> None:
    def packs(runner: Any, tensors: list[tuple[str, torch.Tensor]]) -> None:
        packed = runner.model.own["fc/weight"].detach().to(torch.float16)
        runner.model.own["fc/weight"] = torch.nn.Parameter(packed)
        raise AssertionError("packed")

    with pytest.raises(NotPutBackError, match=r"packed. The draft is lost \(.*own.fc/weight\): restart the server"):
        replace_draft(updater, draft_of(checkpoints), lambda: list(own_tensors(checkpoints, 1.5).items()), packs)


def test_a_copy_that_host_memory_has_no_room_for_is_a_refusal(updater: Updater, checkpoints: Checkpoints) -> None:
    """Raised on one rank alone it would leave the others waiting for it."""
    before = updater.draft.state()
    without_numbers = torch.empty(3, device="meta")  # as a copy without room, its copy raises
    updater.draft.register_buffer("scratch", without_numbers)
    with pytest.raises(PushError, match="NotImplementedError"):
        replace_draft(updater, draft_of(checkpoints), lambda: list(own_tensors(checkpoints, 1.5).items()), load)
    assert equal(updater.draft.state(), before)


@pytest.mark.parametrize(
    ("change", "draft", "says"),
    [
        (lambda updater: updater.offload_tags.add("weights"), Draft(OWN, "/d"), "resume its memory first"),
        (lambda updater: None, Draft(NONE), "drafts without weights"),
        (lambda updater: None, Draft(UNKNOWN, problem="Worker has its model runners"), "Worker has its model runners"),
        (lambda updater: updater.quantize("fp8"), Draft(OWN, "/d"), r"quantized \(fp8\)"),
        (lambda updater: None, Draft(OWN, "/no/such/folder"), "/no/such/folder is no folder here"),
    ],
)
def test_what_a_push_cannot_load_into_is_told(updater: Updater, change: Any, draft: Draft, says: str) -> None:
    change(updater)
    with pytest.raises(PushError, match=says):
        replace_draft(updater, draft, list, load)


def test_a_folder_gives_the_draft_without_its_tables_and_must_have_the_same(
    updater: Updater, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    read = dict(of_folder(checkpoints.eagle3, draft_of(checkpoints)))
    assert own_tensors(checkpoints).keys() == read.keys() - {EMBEDDING}
    other = tmp_path / "other"
    shutil.copytree(checkpoints.eagle3, other)
    stored = load_file(other / "model.safetensors")
    save_file({**stored, "d2t": stored["d2t"] + 1}, other / "model.safetensors")
    with pytest.raises(PushError, match=r"d2t of .*other differs from the server's: restart it"):
        of_folder(other, draft_of(checkpoints))


def _on_rank(rank: int, problem: str, place: str, told: Any) -> None:
    if distributed.is_initialized():  # this process's parent has a group of its own
        distributed.destroy_process_group()
    distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    try:
        agree(problem, distributed.group.WORLD)
        told.put((rank, ""))
    except PushError as error:
        told.put((rank, str(error)))


def test_what_one_rank_refuses_every_rank_refuses(tmp_path: Path) -> None:
    forked = multiprocessing.get_context("fork")  # a new interpreter would import for as long as all else here takes
    told = forked.Queue()
    problems = ("", "fc.weight is damaged")
    ranks = [
        forked.Process(target=_on_rank, args=(rank, problem, str(tmp_path / "meet"), told))
        for rank, problem in enumerate(problems)
    ]
    for each in ranks:
        each.start()
    assert dict(told.get(timeout=60.0) for _ in ranks) == dict.fromkeys((0, 1), "fc.weight is damaged")
    for each in ranks:
        each.join()


@pytest.mark.parametrize("load_format", [None, "flattened_bucket", "slime_spec.drafts"])
def test_every_other_request_is_sglangs(load_format: str | None) -> None:
    request, asked = SimpleNamespace(load_format=load_format), []
    push(OF_AN_UPDATER, lambda updater, recv_req: asked.append((updater, recv_req)), "updater", request)
    assert asked == [("updater", request)]


class Loader:
    """What of a runner loads from 0.5.21 on; it dies of tensors without numbers."""

    def __init__(self, dies: bool = False) -> None:
        self.calls: list[str] = []
        self._dies = dies

    def begin_weight_update(self) -> None:
        self.calls.append("begin")

    def end_weight_update(self, run_post_load: bool) -> None:
        self.calls.append("end")

    def update_weights_from_tensor(self, named_tensors: Any, load_format: None) -> tuple[bool, str]:
        self.calls.append("load")
        if self._dies:
            raise AssertionError("org_vocab_size")
        return True, ""


@pytest.mark.parametrize("dies", [False, True])
def test_what_was_begun_is_ended_whatever_the_loader_does(dies: bool) -> None:
    loader = Loader(dies)
    with pytest.raises(AssertionError) if dies else nullcontext():
        BEGUN_AND_ENDED.load(SimpleNamespace(weight_updater=loader), [])
    assert loader.calls == ["begin", "load", "end"]


MESSAGES = SimpleNamespace(
    UpdateWeightsFromTensorReqOutput=SimpleNamespace,
    EndWeightUpdateReqInput=lambda: SimpleNamespace(rid=None),
)
PUSH = SimpleNamespace(load_format="slime_spec.draft=/new", flush_cache=False)


@dataclass
class WithSession(Updater):
    """The updater from 0.5.21 on."""

    _session: str | None = None

    def end_weight_update(self, recv_req: Any) -> None:
        self._session = None


def pushed(updater: Any, session: LazySession, layout: Layout = BEGUN_AND_ENDED) -> Any:
    updates = DraftSafeUpdates(session, State())
    return push(layout, pytest.fail, updater, PUSH, updates=updates, messages=lambda: MESSAGES)


def test_a_push_within_a_clients_session_is_refused_and_leaves_it_open(updater: Updater) -> None:
    served = WithSession(updater.tp_worker, updater.draft_worker, updater.tp_cpu_group, _session="all")
    answer = pushed(served, LazySession(lambda: MESSAGES))
    assert (answer.success, served._session) == (False, "all")
    assert answer.message == "a client's session of weight updates is open: end it first. The draft is as it was."


def test_a_push_closes_the_session_that_the_plug_in_opened(updater: Updater) -> None:
    """An MTP head is begun and ended with it: begun twice, packed weights would be unpacked twice."""
    served = WithSession(updater.tp_worker, updater.draft_worker, updater.tp_cpu_group, _session="all")
    session = LazySession(lambda: MESSAGES)
    session.is_open = True
    answer = pushed(served, session)
    assert (served._session, session.closed_by) == (None, {"a push of the draft": 1})
    assert (answer.success, "/new" in answer.message) == (False, True)  # there is no such folder


WITHOUT_XXHASH = """
from types import SimpleNamespace
from torch import distributed
from rollout.sglang_engine.plugin.draft_push import OF_AN_UPDATER, push
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
updater = SimpleNamespace(tp_cpu_group=distributed.group.WORLD)
request = SimpleNamespace(load_format="slime_spec.draft=/new")
answers = SimpleNamespace(UpdateWeightsFromTensorReqOutput=SimpleNamespace)
answer = push(OF_AN_UPDATER, None, updater, request, messages=lambda: answers)
print(answer.success, answer.message)
"""


def test_a_push_where_a_package_is_missing_is_refused_by_its_name(tmp_path: Path) -> None:
    """SGLang brings some through packages of its own; raised in a scheduler it would end the server."""
    (tmp_path / "xxhash.py").write_text("""raise ModuleNotFoundError("No module named 'xxhash'")""")
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_XXHASH],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == (
        "False the servers' environment lacks what a push needs: No module named 'xxhash'. The draft is as it was.\n"
    )
