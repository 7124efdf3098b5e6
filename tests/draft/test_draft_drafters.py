"""Drafters with a network: greedy output is the target's, and their weights follow pushes of either side."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.embedded.drafters.block_drafter import BlockDrafter
from rollout.embedded.drafters.feature_drafter import FeatureDrafter
from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import draft_shapes, load_draft, save_draft_checkpoint
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.tree import Config, EngineConfig
from slime_spec.errors import ConfigError
from slime_spec.types import GroupRequest, SamplingParams
from tests.support.draft_formats import BLOCK_FORMATS, FORMATS, FreshDraft, TinyDraft, make_format
from tests.support.embedded_harness import Samples, greedy, make_core, random_prompt, run
from tests.support.recording_drafter import RecordingDrafter
from tests.support.tiny_drafts import edit_tensors, random_tensors
from tests.support.tiny_models import make_tiny_checkpoint

PROMPTS = [random_prompt(1 + 5 * i, seed=i) for i in range(6)]
SHAPES = [(1, 1, 2), (3, 1, 4), (5, 4, 8), (3, 8, 32)]


def requests(params: SamplingParams) -> list[GroupRequest]:
    return [GroupRequest(str(i), prompt, tuple(range(1 + i % 3)), params) for i, prompt in enumerate(PROMPTS)]


@pytest.fixture(params=[*FORMATS, *BLOCK_FORMATS], scope="module")
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyDraft:
    return make_format(tmp_path_factory.mktemp("format"), request.param)


@pytest.fixture(scope="module")
def plain(tiny: TinyDraft) -> Samples:
    return run(make_core(tiny.plain), requests(greedy(32)))


@pytest.fixture(scope="module")
def eagle3(tmp_path_factory: pytest.TempPathFactory) -> TinyDraft:
    return make_format(tmp_path_factory.mktemp("eagle3"), "eagle3")


@pytest.fixture(scope="module")
def eagle(tmp_path_factory: pytest.TempPathFactory) -> TinyDraft:
    return make_format(tmp_path_factory.mktemp("eagle"), "eagle")


def tokens_of(samples: Samples) -> dict[tuple[str, int], tuple[int, ...]]:
    return {key: sample.token_ids for key, sample in samples.items()}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_greedy_output_is_the_targets(tiny: TinyDraft, plain: Samples, shape: tuple[int, int, int]) -> None:
    samples = run(make_core(tiny.config(*shape)), requests(greedy(32)))
    assert tokens_of(samples) == tokens_of(plain)
    if shape[1] > 1:
        assert sum(sample.spec.num_correct for sample in samples.values()) > 0


def test_a_request_may_sit_out_while_others_speculate(tiny: TinyDraft, plain: Samples) -> None:
    mixed = [
        GroupRequest(each.group_id, each.prompt_token_ids, each.seeds, greedy(32, speculative=index % 2 == 0))
        for index, each in enumerate(requests(greedy(32)))
    ]
    samples = run(make_core(tiny.config(3)), mixed)
    assert tokens_of(samples) == tokens_of(plain)
    assert {bool(sample.spec.num_rounds) for (group, _), sample in samples.items() if int(group) % 2} == {False}


def drafter_of(tiny: TinyDraft, **settings: Any) -> FeatureDrafter | BlockDrafter:
    drafter = make_core(tiny.config(3, **settings)).drafter
    assert isinstance(drafter, FeatureDrafter | BlockDrafter)
    return drafter


def test_a_drafters_weights_are_the_files_bit_for_bit(tiny: TinyDraft) -> None:
    weights = drafter_of(tiny).weights
    stored = FreshDraft(tiny).draft.tensors
    assert weights.exact
    assert list(weights.shapes) == list(weights.tensors()) == list(draft_shapes(drafter_of(tiny).spec))
    for name, tensor in weights.tensors().items():
        assert torch.equal(tensor.double(), stored[name])


def test_pushed_weights_draft_from_the_next_round_on(tiny: TinyDraft) -> None:
    drafter = drafter_of(tiny)
    pushed = random_tensors(dict(drafter.weights.shapes), seed=9)
    memory = {name: tensor.clone() for name, tensor in pushed.items()}
    drafter.weights.build(memory)()
    for tensor in memory.values():
        tensor.fill_(float("nan"))  # what a transport's memory becomes afterwards
    for name, tensor in drafter.weights.tensors().items():
        assert torch.equal(tensor, pushed[name])
    core = make_core(tiny.config(3))
    core.drafter.weights.build(pushed)()
    recorder = RecordingDrafter(core.drafter)
    before, after = RecordingDrafter(make_core(tiny.config(3)).drafter), recorder
    for each in (before, after):
        run(make_core(tiny.config(3), drafter=each), requests(greedy(8)))
    assert [each.draft.token_ids for each in before.proposals] != [each.draft.token_ids for each in after.proposals]


def test_after_a_push_of_the_target_drafts_use_its_new_embedding_and_head(eagle: TinyDraft, tmp_path: Path) -> None:
    other = make_tiny_checkpoint(tmp_path / "other", num_hidden_layers=4)
    changed = random_tensors({"model.embed_tokens.weight": (131, 48), "lm_head.weight": (131, 48)}, seed=3)
    edit_tensors(other, **{name.replace(".", "__"): tensor for name, tensor in changed.items()})
    moved = replace(eagle, target=other, twin=other)
    hot = tmp_path / "hot.pt"
    torch.save(list(range(0, 131, 2)), hot)
    for token_map in (None, str(hot)):
        drafter = make_core(eagle.config(3, token_map=token_map)).drafter
        drafter.bind(make_core(moved.plain).target.decoder)()  # what the core does when a push commits
        recorder = RecordingDrafter(drafter)
        run(make_core(moved.config(3, token_map=token_map), drafter=recorder), requests(greedy(8)))
        fresh = RecordingDrafter(make_core(moved.config(3, token_map=token_map)).drafter)
        run(make_core(moved.config(3, token_map=token_map), drafter=fresh), requests(greedy(8)))
        assert [each.draft for each in recorder.proposals] == [each.draft for each in fresh.proposals]


def test_a_token_map_cuts_the_head_to_hot_tokens_whatever_their_order(eagle: TinyDraft, tmp_path: Path) -> None:
    hot = torch.randperm(131, generator=torch.Generator().manual_seed(0))[:40]
    torch.save(hot.tolist(), tmp_path / "hot.pt")
    config = eagle.config(3, token_map=str(tmp_path / "hot.pt"), use_rejection_sampling=True)
    recorder = RecordingDrafter(make_core(config).drafter)
    run(make_core(config, drafter=recorder), requests(SamplingParams(max_new_tokens=8)))
    fresh, cold = FreshDraft(eagle), torch.ones(131, dtype=torch.bool)
    cold[hot] = False
    for each in recorder.proposals:
        assert set(each.draft.token_ids) <= set(hot.tolist())
        for node in range(len(each.draft.token_ids)):
            distribution = fresh.log_distribution(each.token_ids, each.draft.token_ids[:node]).masked_fill(
                cold, float("-inf")
            )
            assert each.draft.q_draft is not None
            assert (each.draft.q_draft[node] - distribution.softmax(-1)).abs().max() < 2e-4


@pytest.mark.parametrize(
    ("stored", "rule"),
    [
        (None, "must be a file"),
        ([1, 2, 2], "different token ids"),
        ([1, 131], "from 0 to 130"),
        ([], "different token ids"),
        ({"a": 1}, "must hold a list of token ids"),
    ],
)
def test_a_token_map_that_is_none_is_refused(eagle: TinyDraft, tmp_path: Path, stored: object, rule: str) -> None:
    path = tmp_path / "map.pt"
    if stored is not None:
        torch.save(stored, path)
    with pytest.raises(ConfigError, match=rule):
        make_core(eagle.config(3, token_map=str(path)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_int8_draft_drafts_almost_what_it_would_and_the_output_is_the_targets(
    tiny: TinyDraft, plain: Samples, dtype: str
) -> None:
    engine = {"dtype": dtype}
    core = make_core(tiny.config(3, draft_model_quantization="int8", engine=engine))
    assert isinstance(core.drafter, FeatureDrafter | BlockDrafter)
    assert not core.drafter.weights.exact
    exact = drafter_of(tiny, engine=engine).weights.tensors()
    for name, tensor in core.drafter.weights.tensors().items():
        step = exact[name].float().abs().amax(dim=-1, keepdim=True) / 127  # of int8's grid
        rounding = 0.0 if tensor.ndim == 1 else 0.51 + (127 * 2**-8 if dtype == "bfloat16" else 0.0)
        assert ((tensor.float() - exact[name].float()).abs() <= rounding * step + 1e-30).all()
    samples = run(core, requests(greedy(32)))
    expected = plain if dtype == "float32" else run(make_core(replace_dtype(tiny, dtype)), requests(greedy(32)))
    assert tokens_of(samples) == tokens_of(expected)


def replace_dtype(tiny: TinyDraft, dtype: str) -> Config:
    return replace(tiny.plain, engine=EngineConfig(dtype=dtype))


def test_a_draft_in_another_dtype_is_cast_with_a_note(
    eagle3: TinyDraft, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = DraftSpec.from_folder(eagle3.draft, ModelSpec.from_folder(eagle3.target))
    read = load_draft(eagle3.draft, spec)
    halves = {name: tensor.half() for name, tensor in read.tensors.items()}
    save_draft_checkpoint(tmp_path / "half", spec, halves, read.hot_token_ids)
    with caplog.at_level(logging.INFO):
        drafter = drafter_of(replace(eagle3, draft=tmp_path / "half"))
    assert "cast the draft" in caplog.text
    for name, tensor in drafter.weights.tensors().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, halves[name].float())
