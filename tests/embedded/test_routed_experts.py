"""The embedded engine returns the experts that made every token: those that transformers' routers choose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rollout.embedded.assemble import Assembly
from rollout.embedded.core import GenerationCore
from rollout.embedded.draft import Draft
from rollout.embedded.kv_cache import KvStore
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.routed_experts import Ids, RoutedExperts, id_dtype
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams
from tests.support.embedded_harness import ReplayDrafter, engine_config, greedy, make_core, random_prompt, run
from tests.support.forced_experts import Routing, same_sets
from tests.support.tiny_models import MIXED, add_mtp_layer, load_reference, make_tiny_checkpoint

PROMPTS = [random_prompt(21, seed=1), random_prompt(34, seed=2)]
SAMPLED = SamplingParams(max_new_tokens=20)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("routed")
    return {name: make_tiny_checkpoint(root / name, name) for name in MIXED}


def recording(folder: Path, algorithm: str = "NONE", **engine: Any) -> Config:
    config = engine_config(folder, algorithm, **engine)
    return replace(config, rollout=replace(config.rollout, routing_replay=True))


def requests(params: SamplingParams = SAMPLED, num_siblings: int = 1) -> list[GroupRequest]:
    return [
        GroupRequest(str(index), prompt, tuple(range(10 * index, 10 * index + num_siblings)), params)
        for index, prompt in enumerate(PROMPTS)
    ]


def chosen_by_transformers(folder: Path, token_ids: tuple[int, ...]) -> Ids:
    """Return ids [tokens - 1, layers, chosen]."""
    model = load_reference(folder)
    with Routing(model, ModelSpec.from_folder(folder)).watched() as routing, torch.no_grad():
        model(torch.tensor([token_ids[:-1]]))
    return routing.choices


def assert_are_transformers(samples: list[GeneratedSample], prompts: list[tuple[int, ...]], folder: Path) -> None:
    for sample in samples:
        text = (*prompts[int(sample.group_id)], *sample.token_ids)
        assert sample.routed_experts is not None
        ids = sample.routed_experts.ids
        assert len(ids) == len(text) - 1
        assert same_sets(ids, chosen_by_transformers(folder, text)).all()


@pytest.mark.parametrize("name", MIXED)
def test_they_are_transformers_token_by_token_for_siblings_and_for_a_lone_sample(
    name: str, folders: dict[str, Path]
) -> None:
    for num_siblings in (1, 3):
        samples = run(make_core(recording(folders[name])), requests(num_siblings=num_siblings))
        assert len(samples) == 2 * num_siblings
        assert_are_transformers(list(samples.values()), PROMPTS, folders[name])
        ids = np.concatenate([each.routed_experts.ids for each in samples.values() if each.routed_experts])
        assert len(np.unique(ids)) == 8, "every expert was chosen somewhere"


def test_they_go_along_when_rows_move_and_memory_grows(folders: dict[str, Path]) -> None:
    """The first group ends first, so that the others' rows move; the last outgrows what was allocated for it."""
    name = "Glm4MoeForCausalLM"
    prompts = [*PROMPTS, random_prompt(9, seed=3)]
    mixed = [
        GroupRequest(str(index), prompt, (index, 7, 8)[:size], SamplingParams(max_new_tokens=length))
        for index, (prompt, size, length) in enumerate(zip(prompts, (2, 1, 3), (5, 40, 150), strict=True))
    ]
    core = make_core(recording(folders[name]))
    moved, grown = [], []
    move_row, resize = core.cache.own.move_row, core.cache.own.resize
    core.cache.own.move_row = lambda *row: (moved.append(row), move_row(*row))  # type: ignore[method-assign, func-returns-value]
    core.cache.own.resize = lambda *shape: (grown.append(shape), resize(*shape))  # type: ignore[method-assign, func-returns-value]
    samples = list(run(core, mixed).values())
    assert moved
    assert len({capacity for _, capacity in grown}) > 1
    assert_are_transformers(samples, prompts, folders[name])


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("num_siblings", [1, 3])
def test_of_speculation_they_are_those_of_accepted_tokens(
    name: str, num_siblings: int, folders: dict[str, Path]
) -> None:
    config = recording(folders[name])
    plain = run(make_core(config), requests(greedy(24), num_siblings))
    core = make_core(config, drafter=ReplayDrafter(plain, PROMPTS, wrong_every=4))
    samples = run(core, requests(greedy(24), num_siblings))
    assert any(each.spec.num_drafted > each.spec.num_correct > 0 for each in samples.values())
    assert_are_transformers(list(samples.values()), PROMPTS, folders[name])


def test_of_a_tree_the_accepted_path_takes_its_experts_along(folders: dict[str, Path]) -> None:
    folder = folders["Qwen3MoeForCausalLM"]
    config = recording(folder)
    plain = run(make_core(config), requests(greedy(24)))

    class Trees(ReplayDrafter):
        """Drafts a wrong token first and the right chain after it, as its sibling."""

        def propose(self, contexts: Any) -> list[Draft]:
            return [_behind_a_wrong_token(draft) for draft in super().propose(contexts)]

    samples = run(make_core(config, drafter=Trees(plain, PROMPTS)), requests(greedy(24)))
    assert all(each.spec.num_correct > 5 for each in samples.values())
    assert_are_transformers(list(samples.values()), PROMPTS, folder)


def _behind_a_wrong_token(draft: Draft) -> Draft:
    if len(draft.token_ids) < 2:
        return draft
    right = draft.token_ids[:-1]
    parents = (-1, -1, *range(1, len(right)))
    return Draft(((right[0] + 1) % 131, *right), parents)


@pytest.mark.parametrize("name", ["Glm4MoeForCausalLM", "DeepseekV3ForCausalLM"])
def test_an_mtp_layer_with_experts_of_its_own_records_none(name: str, tmp_path: Path) -> None:
    folder = add_mtp_layer(make_tiny_checkpoint(tmp_path, name))
    samples = run(make_core(recording(folder, "NEXTN")), requests(num_siblings=2))
    assert sum(each.spec.num_drafted for each in samples.values()) > 0
    assert_are_transformers(list(samples.values()), PROMPTS, folder)


def test_a_prompt_out_of_the_prompt_cache_brings_its_experts(folders: dict[str, Path]) -> None:
    name = "DeepseekV3ForCausalLM"
    core = make_core(recording(folders[name]))
    run(core, requests())
    longer = [(*prompt, 5, 6, 7) for prompt in PROMPTS]
    again = [GroupRequest(str(i), prompt, (7, 8)[: 1 + i], SAMPLED) for i, prompt in enumerate(longer)]
    samples = list(run(core, again).values())
    assert [min(each.cached_tokens for each in samples if each.group_id == str(i)) for i in (0, 1)] == [21, 34]
    assert_are_transformers(samples, longer, folders[name])


def test_a_preempted_sample_keeps_the_experts_that_made_its_logprobs(folders: dict[str, Path]) -> None:
    name = "Qwen3MoeForCausalLM"
    core = make_core(recording(folders[name], max_total_tokens=200))
    many = [GroupRequest("0", PROMPTS[0], tuple(range(4)), greedy(60))]
    samples = list(run(core, many).values())
    assert any(each.num_preemptions for each in samples)
    assert_are_transformers(samples, PROMPTS, folders[name])


def test_a_resumed_sample_keeps_the_experts_of_the_weights_that_made_it(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """What was generated under older weights is replayed as it was; the rest comes of the newer weights."""
    name = "Glm4MoeForCausalLM"
    other = make_tiny_checkpoint(tmp_path, name, initializer_range=0.3)
    params = greedy(16)
    aborted = aborted_after(make_core(recording(folders[name])), 6, params)
    num_had = len(PROMPTS[0]) + len(aborted.token_ids) - 1
    assert aborted.routed_experts is not None
    assert aborted.routed_experts.num_tokens == num_had
    request = GroupRequest("0", PROMPTS[0], (0,), params, partials=(aborted,))
    (resumed,) = run(make_core(recording(other)), [request]).values()
    assert resumed.routed_experts is not None
    text = (*PROMPTS[0], *resumed.token_ids)
    older, newer = (chosen_by_transformers(each, text) for each in (folders[name], other))
    got = resumed.routed_experts.ids
    assert not same_sets(older, newer).all()
    assert same_sets(got[:num_had], older[:num_had]).all()
    assert same_sets(got[num_had:], newer[num_had:]).all()


def aborted_after(core: GenerationCore, num_tokens: int, params: SamplingParams) -> GeneratedSample:
    done: list[GeneratedSample] = []
    group = core.add(GroupRequest("0", PROMPTS[0], (0,), params), done.append)
    while not core.batch.sequences or core.batch.sequences[0].num_generated < num_tokens:
        core.step()
    core.abort(group)
    return done[0]


def test_without_the_setting_nothing_is_recorded(folders: dict[str, Path]) -> None:
    folder = folders["Qwen3MoeForCausalLM"]
    core = make_core(engine_config(folder))
    assert all(each.routed_experts is None for each in run(core, requests()).values())
    assert not core.cache.own.experts


def test_a_token_takes_a_byte_for_each_choice_and_the_bound_of_the_cache_counts_it(folders: dict[str, Path]) -> None:
    folder = folders["DeepseekV3ForCausalLM"]
    spec = ModelSpec.from_folder(folder)
    assert spec.experts is not None
    sample = run(make_core(recording(folder)), requests())["0", 0]
    assert sample.routed_experts is not None
    assert len(sample.routed_experts.data) == (len(PROMPTS[0]) + 19) * 2 * 4  # 2 layers of 3, 4 experts of 8
    without, with_experts = (
        KvStore(spec, torch.float32, torch.device("cpu")),
        KvStore(spec, torch.float32, torch.device("cpu"), spec.experts),
    )
    for store in (without, with_experts):
        store.resize(3, 10)
    assert with_experts.nbytes - without.nbytes == 3 * 10 * 8
    limits = [Assembly(make(folder)).limits.max_total_tokens for make in (engine_config, recording)]
    per_token = without.nbytes // 30
    assert limits == [int(1e9 / per_token), int(1e9 / (per_token + 8))]


def test_a_model_without_experts_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r"rollout.routing_replay: .*LlamaForCausalLM has none") as refusal:
        make_core(recording(folder))
    assert "--use-rollout-routing-replay" in refusal.value.remedy


@pytest.mark.parametrize(("num_experts", "item_bytes"), [(256, 1), (257, 2)])
def test_ids_come_back_as_they_were(num_experts: int, item_bytes: int) -> None:
    ids = np.random.default_rng(0).integers(0, num_experts, (7, 3, 2)).astype(id_dtype(num_experts))
    held = RoutedExperts.of(ids)
    assert held.item_bytes == item_bytes
    assert held.num_tokens == 7
    assert np.array_equal(held.ids, ids)
    assert np.array_equal(held.first(3).ids, ids[:3])
    later = RoutedExperts.of(np.zeros_like(ids))
    assert np.array_equal(held.first(3).completed(later).ids, np.concatenate([ids[:3], np.zeros_like(ids[3:])]))
