"""A draft on a server, replaced whole or not at all, and kept while its memory is away; on stand-ins for SGLang's."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from rollout.sglang_engine.plugin.draft_push import OF_AN_UPDATER, push
from rollout.sglang_engine.plugin.drafts import OWN
from rollout.sglang_engine.plugin.kept_draft import KeptDraft
from rollout.sglang_engine.plugin.new_draft import agree, of_folder, replace_draft
from slime_spec.errors import PushError
from tests.sglang.conftest import Checkpoints
from tests.support.sglang_real import TABLES

EMBEDDING = "embed_tokens.weight"


class Draft(torch.nn.Module):
    """Own tensors, the target's embedding, and a table that is neither parameter nor buffer."""

    def __init__(self, target: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.embed_tokens = target
        self.own = torch.nn.ParameterDict({name.replace(".", "/"): each.clone() for name, each in tensors.items()})
        self.hot_token_id = torch.arange(3)

    def state(self) -> dict[str, torch.Tensor]:
        return {name.replace("/", "."): each.detach().clone() for name, each in self.own.items()}


@dataclass
class Updater:
    """What of SGLang's updater the plug-in uses."""

    tp_worker: Any
    draft_worker: Any
    tp_cpu_group: Any
    memory_saver_adapter: Any = field(default_factory=lambda: SimpleNamespace(enabled=True))
    offload_tags: set[str] = field(default_factory=set)

    @property
    def draft(self) -> Draft:
        draft: Draft = self.draft_worker.weight_update_runners()[0][1].model
        return draft

    @property
    def target(self) -> torch.nn.Module:
        target: torch.nn.Module = self.tp_worker.model_runner.model
        return target


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Any]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def own(checkpoints: Checkpoints, factor: float = 1.0) -> dict[str, torch.Tensor]:
    stored = load_file(checkpoints.eagle3 / "model.safetensors")
    return {name: each * factor for name, each in stored.items() if name not in TABLES and name != EMBEDDING}


@pytest.fixture
def updater(checkpoints: Checkpoints, one_rank: Any) -> Updater:
    target = torch.nn.Embedding(5, 2)
    runner = SimpleNamespace(
        model=Draft(target, own(checkpoints)), model_config=SimpleNamespace(model_path=str(checkpoints.eagle3))
    )
    algorithm = SimpleNamespace(is_standalone=lambda: False)
    config = SimpleNamespace(model_path=str(checkpoints.target))
    served = SimpleNamespace(model=target, model_config=config, spec_algorithm=algorithm)
    worker = SimpleNamespace(weight_update_runners=lambda: [("draft", runner)])
    return Updater(SimpleNamespace(model_runner=served), worker, one_rank)


def load(runner: Any, tensors: list[tuple[str, torch.Tensor]]) -> None:
    """SGLang's loaders write one tensor after another and raise at what they cannot load."""
    for name, tensor in tensors:
        if name == EMBEDDING:
            runner.model.embed_tokens.weight.data.fill_(0.0)
        else:
            runner.model.own[name.replace(".", "/")].data.copy_(tensor)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_whole_push_replaces_the_draft(updater: Updater, checkpoints: Checkpoints) -> None:
    new = own(checkpoints, 1.5)
    assert replace_draft(updater, OWN, lambda: list(new.items()), load) == len(new)
    assert equal(updater.draft.state(), new)


def test_a_push_never_writes_what_the_draft_shares_with_the_target(
    updater: Updater, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Many drafts' files have a copy of the target's embedding."""
    with_embedding = tmp_path / "with_embedding"
    shutil.copytree(checkpoints.eagle3, with_embedding)
    new = {**own(checkpoints, 1.5), EMBEDDING: torch.ones(257, 64)}
    save_file(new, with_embedding / "model.safetensors")
    updater.draft_worker.weight_update_runners()[0][1].model_config.model_path = str(with_embedding)
    before = updater.target.weight.detach().clone()
    assert replace_draft(updater, OWN, lambda: list(new.items()), load) == len(new)
    assert torch.equal(updater.target.weight, before)
    assert equal(updater.draft.state(), own(checkpoints, 1.5))


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
    new = own(checkpoints, 1.5)
    change(new)

    def loads_nothing(runner: Any, tensors: Any) -> None:
        pytest.fail("a refused push was loaded")

    with pytest.raises(PushError, match=says):
        replace_draft(updater, OWN, lambda: list(new.items()), loads_nothing)


def test_a_draft_that_breaks_while_it_is_loaded_is_put_back(updater: Updater, checkpoints: Checkpoints) -> None:
    before = updater.draft.state()

    def dies_half_way(runner: Any, tensors: list[tuple[str, torch.Tensor]]) -> None:
        load(runner, tensors[: len(tensors) // 2])
        assert not equal(runner.model.state(), before)
        raise AssertionError("org_vocab_size")

    with pytest.raises(PushError, match="AssertionError: org_vocab_size"):
        replace_draft(updater, OWN, lambda: list(own(checkpoints, 1.5).items()), dies_half_way)
    assert equal(updater.draft.state(), before)


def test_there_is_nothing_to_load_into_without_memory_or_without_weights(updater: Updater) -> None:
    updater.offload_tags.add("weights")
    with pytest.raises(PushError, match="resume its memory first"):
        replace_draft(updater, OWN, list, load)
    updater.offload_tags.clear()
    updater.draft_worker = None
    with pytest.raises(PushError, match="drafts without weights"):
        replace_draft(updater, OWN, list, load)


def test_a_folder_gives_the_draft_without_its_tables_and_must_have_the_same(
    updater: Updater, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    read = dict(of_folder(checkpoints.eagle3, updater, OWN))
    assert own(checkpoints).keys() == read.keys() - {EMBEDDING}
    other = tmp_path / "other"
    shutil.copytree(checkpoints.eagle3, other)
    stored = load_file(other / "model.safetensors")
    save_file({**stored, "d2t": stored["d2t"] + 1}, other / "model.safetensors")
    with pytest.raises(PushError, match=r"d2t of .*other differs from the server's: restart it"):
        of_folder(other, updater, OWN)


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


def test_without_the_plug_in_a_draft_is_lost(updater: Updater) -> None:
    lose(updater)
    assert not any(bool(each.any()) for each in updater.draft.state().values())


def test_memory_without_weights_and_servers_that_give_none_away_need_no_copy(updater: Updater) -> None:
    for tags, is_enabled in ((["kv_cache"], True), (None, False)):
        updater.memory_saver_adapter.enabled = is_enabled
        assert release_and_resume(updater, tags).num_kept == 0
