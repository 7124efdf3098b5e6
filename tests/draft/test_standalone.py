"""A whole model as draft: exact, caught up after every round, and never refused what it would have accepted."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rollout.embedded.drafting import DraftContext
from slime_spec.config.tree import Config, EngineConfig, ModelConfig, SpeculativeConfig
from slime_spec.types import GroupRequest, SamplingParams
from tests.support.embedded_harness import Samples, greedy, make_core, random_prompt, run
from tests.support.recording_drafter import Proposal, RecordingDrafter
from tests.support.tiny_drafts import edit_tensors
from tests.support.tiny_models import load_reference, make_tiny_checkpoint
from tests.support.tiny_policy import make_tiny_policy

PROMPTS = [random_prompt(length, seed=length) for length in (1, 2, 9, 30, 5)]
SEEDS = [(0,), (1, 2, 3), (4, 5), (6,), (7, 8, 9)]


@pytest.fixture(scope="module")
def similar(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target with its weights shaken a little: often, but not always, of its opinion."""
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("similar") / "model", num_hidden_layers=4)
    generator = torch.Generator().manual_seed(1)
    stored = load_file(folder / "model.safetensors")
    shaken = {name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator) for name, tensor in stored.items()}
    return edit_tensors(folder, **{name.replace(".", "__"): tensor for name, tensor in shaken.items()})


def requests(params: SamplingParams) -> list[GroupRequest]:
    return [GroupRequest(str(i), PROMPTS[i], seeds, params) for i, seeds in enumerate(SEEDS)]


def settings(target: Path, draft: Path, shape: tuple[int, int, int], engine: dict | None = None, **spec) -> Config:  # type: ignore[no-untyped-def]
    steps, topk, count = shape
    speculative = SpeculativeConfig(
        algorithm="STANDALONE",
        draft_model_path=str(draft),
        num_steps=steps,
        eagle_topk=topk,
        num_draft_tokens=count,
        **spec,
    )
    model = ModelConfig(hf_checkpoint=str(target))
    return Config(model=model, speculative=speculative, engine=EngineConfig(**(engine or {})))


def recorded(config: Config, params: SamplingParams) -> tuple[list[Proposal], Samples]:
    recorder = RecordingDrafter(make_core(config).drafter)
    return recorder.proposals, run(make_core(config, drafter=recorder), requests(params))


def tokens_of(samples: Samples) -> dict[tuple[str, int], tuple[int, ...]]:
    return {key: sample.token_ids for key, sample in samples.items()}


def histogram(samples: Samples) -> list[int]:
    """Rounds by the number of drafts that stood, over all samples."""
    width = max(len(sample.spec.histogram) for sample in samples.values())
    padded = [(*sample.spec.histogram, *[0] * width)[:width] for sample in samples.values()]
    return [sum(column) for column in zip(*padded, strict=True)]


@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 1, 4), (6, 1, 7), (3, 2, 6), (4, 3, 30)])
def test_greedy_output_is_the_targets_and_partly_foreseen(target: Path, similar: Path, shape: tuple) -> None:
    plain = run(make_core(Config(model=ModelConfig(hf_checkpoint=str(target)))), requests(greedy(40)))
    samples = run(make_core(settings(target, similar, shape)), requests(greedy(40)))
    assert tokens_of(samples) == tokens_of(plain)
    counts = histogram(samples)
    assert all(counts), "every number of drafts stood at times, none to all"
    assert len(counts) == shape[0] + 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_target_as_its_own_draft_has_everything_accepted(target: Path, temperature: float) -> None:
    config = settings(target, target, (4, 1, 5), use_rejection_sampling=True)
    samples = run(make_core(config), requests(SamplingParams(max_new_tokens=41, temperature=temperature)))
    for sample in samples.values():
        assert sample.spec.histogram == (0, 0, 0, 0, 8)  # 40 tokens after the prefill's, five a round


@pytest.mark.parametrize("topk", [1, 2, 3])
def test_the_targets_own_greedy_path_is_always_in_its_tree(target: Path, topk: int) -> None:
    samples = run(make_core(settings(target, target, (3, topk, 1 + 3 * topk))), requests(greedy(41)))
    for sample in samples.values():
        assert sample.spec.num_correct + sample.spec.num_rounds == 40
        assert sum(sample.spec.histogram[:2]) <= sample.spec.num_rounds // 2


@pytest.mark.parametrize("engine", [{}, {"max_total_tokens": 330}, {"max_running_requests": 2}])
def test_after_any_acceptance_drafts_are_what_transformers_would_draft(
    target: Path, similar: Path, engine: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout.embedded.prefill.CHUNK_TOKENS_ALONE", 7)
    config = settings(target, similar, (3, 1, 4), engine, use_rejection_sampling=True)
    proposals, samples = recorded(config, SamplingParams(max_new_tokens=80, temperature=1.0))
    assert all(histogram(samples)), "every number of drafts stood at times, none to all"
    if "max_total_tokens" in engine:
        assert sum(sample.num_preemptions for sample in samples.values())
    model = load_reference(similar)
    for each in proposals[:: len(proposals) // 60]:
        ids = torch.tensor([[*each.token_ids, *each.draft.token_ids]])
        with torch.no_grad():
            distributions = model(ids).logits[0, len(each.token_ids) - 1 : -1].softmax(-1)
        assert each.draft.q_draft is not None
        assert (each.draft.q_draft - distributions).abs().max() < 2e-4


def test_sampled_drafts_are_drawn_with_the_uniforms_of_their_tokens(target: Path, similar: Path) -> None:
    config = settings(target, similar, (3, 1, 4), use_rejection_sampling=True)
    proposals, _ = recorded(config, SamplingParams(max_new_tokens=20, temperature=0.8))
    for each in proposals:
        context: DraftContext = each.context
        first = len(each.token_ids) - context.num_prompt_tokens
        assert each.draft.q_draft is not None
        for node, token in enumerate(each.draft.token_ids):
            cumulative = each.draft.q_draft[node].double().cumsum(0)
            uniform = context.uniforms[first + node] * float(cumulative[-1])
            assert (cumulative[token - 1] if token else 0.0) - 1e-6 <= uniform <= cumulative[token] + 1e-6


def test_a_request_that_samples_and_one_that_does_not_draft_side_by_side(target: Path, similar: Path) -> None:
    config = settings(target, similar, (3, 1, 4), use_rejection_sampling=True)
    recorder = RecordingDrafter(make_core(config).drafter)
    core = make_core(config, drafter=recorder)
    mixed = [GroupRequest("0", PROMPTS[3], (1,), greedy(30)), GroupRequest("1", PROMPTS[4], (2,), SamplingParams(30))]
    samples = run(core, mixed)
    alone = run(make_core(settings(target, similar, (3, 1, 4))), mixed[:1])
    assert samples["0", 0].token_ids == alone["0", 0].token_ids
    distributions = {each.context.params.temperature: each.draft.q_draft for each in recorder.proposals}
    assert distributions[0.0] is None
    assert distributions[1.0] is not None


def test_models_that_pad_one_vocabulary_differently_draft_for_each_other(tmp_path: Path) -> None:
    small = make_tiny_policy(tmp_path / "small", vocab_size=258)
    large = make_tiny_policy(tmp_path / "large", vocab_size=300, num_hidden_layers=1)
    prompts = [random_prompt(6, seed=i, vocab=256) for i in range(3)]
    for target, draft in ((small, large), (large, small)):
        params = SamplingParams(max_new_tokens=30, ignore_eos=True)
        group = [GroupRequest(str(i), prompt, (i,), params) for i, prompt in enumerate(prompts)]
        for temperature_one in (False, True):
            config = settings(target, draft, (3, 1, 4), use_rejection_sampling=temperature_one)
            samples = run(make_core(config), group)
            assert {len(sample.token_ids) for sample in samples.values()} == {30}
