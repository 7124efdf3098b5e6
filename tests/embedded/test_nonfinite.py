"""A draft whose numbers overflow costs drafts and nothing else; a target's ends the request that met them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rollout.embedded.draft import Draft
from rollout.embedded.drafters.chain import grow_chains
from rollout.embedded.drafters.step import DraftVocab, Drawing, Heads
from rollout.embedded.drafters.tree import grow_trees
from rollout.embedded.drafting import DraftContext, KvRow
from rollout.embedded.engine import EmbeddedEngine
from rollout.embedded.plan import RowSpan
from rollout.embedded.request import Progress
from rollout.embedded.uniforms import Noise
from slime_spec.config.speculative import UNQUANTIZED
from slime_spec.config.tree import Config, SpeculativeConfig
from slime_spec.errors import GenerationError, PushError
from slime_spec.metrics.rollout import rollout_metrics
from slime_spec.sglang.metadata import meta_info
from slime_spec.speculation.confidence import ConfidenceCalibration, StopRule
from slime_spec.speculation.round_costs import PassCurve, RoundCosts
from slime_spec.types import GeneratedSample, GroupRequest, Prompt, Sample, SamplingParams
from slime_spec.weights.messages import CommitPush, PushMessage
from slime_spec.weights.run import run_push
from tests.support.draft_formats import make_format
from tests.support.embedded_harness import engine_config, make_core, run
from tests.support.pushes import DirectTransport, disturbed, other_weights, push_of
from tests.support.tiny_models import make_tiny_checkpoint

# The tensor of each format with which all that comes out overflows, although its numbers are finite.
OVERFLOWS = {
    "eagle3": "fc.weight",
    "dflash": "fc.weight",
    "dspark": "fc.weight",
    "eagle": "fc.weight",
    "mimo": "final_layernorm.weight",
    "standalone": "lm_head.weight",
}
RULES = {
    "greedy chain": ({"num_steps": 3}, 0.0),
    "chosen chain": ({"num_steps": 3}, 1.0),
    "sampled chain": ({"num_steps": 3, "use_rejection_sampling": True}, 1.0),
    "sampled block": ({"num_steps": 3, "use_block_verification": True}, 1.0),
    "tree": ({"num_steps": 3, "topk": 3, "num_draft_tokens": 8}, 1.0),
}


def drafting(folder: Path, name: str, **shape: object) -> Config:
    if name != "standalone":
        return make_format(folder, name).config(**shape)  # type: ignore[arg-type]
    target, draft = make_tiny_checkpoint(folder / "target"), make_tiny_checkpoint(folder / "draft", num_hidden_layers=1)
    shape = {"eagle_topk": shape.pop("topk", 1), **shape}
    speculative = SpeculativeConfig(algorithm="STANDALONE", draft_model_path=str(draft), **shape)  # type: ignore[arg-type]
    return replace(engine_config(target), speculative=speculative)


def started(config: Config) -> EmbeddedEngine:
    engine = EmbeddedEngine(config, 0, DirectTransport())
    engine.start()
    return engine


def generated(engine: EmbeddedEngine, temperature: float) -> list[GeneratedSample]:
    params = SamplingParams(max_new_tokens=8, temperature=temperature, ignore_eos=True)
    samples = list(engine.generate(GroupRequest("g", (1, 2, 3), (1, 2, 3), params)))
    return sorted(samples, key=lambda sample: sample.sample_index)


def pushed(engine: EmbeddedEngine, weights: dict[str, torch.Tensor], version: int) -> None:
    run_push(push_of(weights, version, "draft"), lambda message: [engine.update_weights(message)])


def metrics_of(samples: Sequence[GeneratedSample]) -> dict[str, float]:
    prompt = Prompt(0, "task", "?", (1, 2, 3), "x")
    return rollout_metrics([Sample(prompt, sample, "", 1.0) for sample in samples])


@pytest.mark.parametrize("name", OVERFLOWS)
def test_an_overflowing_draft_drafts_nothing_and_changes_no_token(tmp_path: Path, name: str) -> None:
    """Case audit/13, for every kind of draft and every rule: the tokens are those of plain decoding.

    A push brings it; a folder with such numbers is refused.
    """
    for rule, (shape, temperature) in RULES.items():
        config = drafting(tmp_path / rule.replace(" ", "-"), name, **shape)
        plain = started(replace(config, speculative=SpeculativeConfig()))
        expected = generated(plain, temperature)
        plain.stop()
        weights = load_file(
            Path(config.speculative.draft_model_path or config.model.hf_checkpoint) / "model.safetensors"
        )
        engine = started(config)
        mine = {key: tensor for key, tensor in weights.items() if key in engine.draft_shapes}
        big = {key: 3e38 * tensor.sign() if key.endswith(OVERFLOWS[name]) else tensor for key, tensor in mine.items()}
        assert any(not torch.equal(big[key], tensor) for key, tensor in mine.items())
        pushed(engine, big, 1)
        samples = generated(engine, temperature)
        engine.stop()
        assert [sample.token_ids for sample in samples] == [sample.token_ids for sample in expected], rule
        for sample, plain_sample in zip(samples, expected, strict=True):
            assert sample.logprobs == pytest.approx(plain_sample.logprobs, abs=1e-4)
            # A token comes out of each round; the last round has no budget for a draft.
            assert (sample.spec.num_rounds, sample.spec.num_nonfinite_rounds) == (7, 6), rule
            assert (sample.spec.num_drafted, sample.spec.num_empty_rounds) == (0, 7)
            assert meta_info(sample)["spec_num_nonfinite_rounds"] == 6
        assert metrics_of(samples)["spec/nonfinite_rounds"] == 18.0
        assert "spec_num_nonfinite_rounds" not in meta_info(expected[0])


def contexts(num: int, limit: int, temperature: float) -> list[DraftContext]:
    params = SamplingParams(temperature=temperature)
    uniforms = (0.1, 0.5, 0.9)
    return [
        DraftContext(row, 0, KvRow(row), [row], 1, limit, limit, params, uniforms, noise=Noise(row))
        for row in range(num)
    ]


def broken_after(token: int, bad: float, vocab: int = 5) -> Callable[[torch.Tensor, torch.Tensor, Sequence], Heads]:
    """A draft that likes token + 1 best and token + 2 next, and has logits that are no numbers after ``token``."""

    def step(tokens: torch.Tensor, hidden: torch.Tensor, spans: Sequence[RowSpan]) -> Heads:
        logits = torch.full((len(tokens), vocab), -9.0)
        for row, each in enumerate(tokens.tolist()):
            logits[row, (each + 1) % vocab], logits[row, (each + 2) % vocab] = 3.0, 1.0
            if each == token:
                logits[row, 4] = bad
        return Heads(logits, tokens.unsqueeze(1).float())

    return step


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drawing", Drawing)
@pytest.mark.parametrize("stop", [None, StopRule(0.0, ConfidenceCalibration())], ids=["whole", "watched"])
def test_a_chain_keeps_what_was_drawn_before_the_logits_broke(
    drawing: Drawing, temperature: float, bad: float, stop: StopRule | None
) -> None:
    step = broken_after(2, bad)
    rows = [each._replace(stop=stop) for each in contexts(3, 3, temperature)]
    first = step(torch.tensor([0, 1, 2]), torch.zeros(3, 1), [])
    slots = [RowSpan(row, 5, 1) for row in range(3)]
    drafts = [each.read() for each in grow_chains(first, step, slots, rows, 3, DraftVocab(5), drawing)]
    cut = [next((i + 1 for i, token in enumerate(each.token_ids) if token == 2), 3) for each in drafts[:2]]
    assert [len(draft.token_ids) for draft in drafts] == [*cut, 0]
    assert [draft.nonfinite for draft in drafts] == [*(length < 3 for length in cut), True]
    assert min(cut) < 3
    if temperature and drawing is Drawing.SAMPLED:
        for draft in drafts[:2]:
            assert draft.q_draft is not None
            assert draft.q_draft.shape == (len(draft.token_ids), 5)
            assert torch.allclose(draft.q_draft.sum(dim=1), torch.ones(len(draft.token_ids)))
    assert drafts[2] == Draft((), (), None, nonfinite=True, confidence=None if stop is None else ())
    if stop is not None:  # what was no number tells nothing: it would never leave the means that it enters
        assert [len(draft.confidence or ()) for draft in drafts] == [*cut, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_tree_loses_the_branch_whose_logits_broke_and_keeps_the_others(bad: float) -> None:
    step = broken_after(2, bad)
    first = step(torch.tensor([0, 1, 2]), torch.zeros(3, 1), [])
    slots = [RowSpan(row, 5, 1) for row in range(3)]
    drafts = [each.read() for each in grow_trees(first, step, slots, contexts(3, 9, 0.0), 3, 2, 9, DraftVocab(5))]
    for draft in drafts[:2]:
        assert draft.nonfinite
        children = [draft.token_ids[parent] for parent in draft.parents if parent >= 0]
        assert children
        assert 2 in draft.token_ids
        assert 2 not in children
        assert all(parent < node for node, parent in enumerate(draft.parents))
    assert drafts[2] == Draft((), (), None, nonfinite=True)
    whole = grow_trees(first, broken_after(9, bad), slots, contexts(3, 9, 0.0), 3, 2, 9, DraftVocab(5))
    assert [(each.nonfinite, each.num_tokens) for each in (draft.read() for draft in whole[:2])] == [(False, 8)] * 2


LONG = SamplingParams(max_new_tokens=40, ignore_eos=True)


@pytest.fixture
def engine(tiny_llama: Path) -> Iterator[EmbeddedEngine]:
    engine = started(engine_config(tiny_llama, "LOOKUP"))
    yield engine
    engine.stop()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("place", ["prompt", "reply"])
def test_a_target_without_finite_logits_ends_the_request_that_met_them_alone(
    engine: EmbeddedEngine, place: str, temperature: float
) -> None:
    sound = GroupRequest("sound", (1, 2, 3), (1, 2), LONG)
    before = sorted(engine.generate(sound), key=lambda sample: sample.sample_index)
    poison = 77
    engine._core.decoder.embedding[poison] = torch.nan
    prompt = (1, poison, 5) if place == "prompt" else (1, 2)
    # A bias makes every sample of the group say the token sooner or later.
    params = replace(LONG, temperature=temperature, logit_bias=() if place == "prompt" else ((poison, 4.0),))
    other, bad = engine.generate(sound), engine.generate(GroupRequest("bad", prompt, (3, 4, 5), params))
    with pytest.raises(
        GenerationError, match=r"logits are not finite numbers at token \d+ of sample \d of group bad, wei"
    ):
        list(bad)
    after = sorted(other, key=lambda sample: sample.sample_index)
    assert [sample.token_ids for sample in after] == [sample.token_ids for sample in before]
    bad.abort()
    engine.ping()
    assert (engine.stats().num_running, engine.stats().num_waiting, engine.stats().kv_tokens_used) == (0, 0, 0)
    assert sorted(sample.token_ids for sample in engine.generate(sound)) == sorted(each.token_ids for each in before)


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_the_rows_that_such_a_request_leaves_are_clean_for_the_next(
    tiny_llama: Path, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention in torch's operators, as on CUDA, reads masked slots too: weight 0 times NaN is NaN."""
    if kernels == "torch":
        monkeypatch.setattr("rollout.embedded.linear.kernels", lambda: None)
    core = make_core(engine_config(tiny_llama, "LOOKUP"))
    params = SamplingParams(max_new_tokens=20, logit_bias=((77, -torch.inf),))
    sound = [GroupRequest("pair", (1, 2, 3), (1, 2), params), GroupRequest("single", (4, 5), (3,), params)]
    expected = {key: sample.token_ids for key, sample in run(core, sound).items()}
    core.decoder.embedding[77] = torch.nan
    given_up: list[GenerationError] = []
    for seeds in ((1, 2, 3), (4,)):
        core.add(GroupRequest("bad", (1, 77, 5) * 9, seeds, params), lambda sample: None, on_failure=given_up.append)
    while core.has_work:
        core.step()
    assert len(given_up) == 2
    for store in (core.cache.own, core.cache.prefixes):
        assert all(tensor.isfinite().all() for tensor in (*store.keys, *store.values))
    assert {key: sample.token_ids for key, sample in run(core, sound).items()} == expected


@pytest.mark.parametrize("name", ["eagle3", "standalone", "dflash", "dspark"])
def test_a_sound_draft_that_is_pushed_over_an_overflowing_one_drafts_at_once(tmp_path: Path, name: str) -> None:
    config = drafting(tmp_path, name, num_steps=3)
    core = make_core(config)
    weights = core.drafter.weights
    assert weights is not None
    sound = {key: tensor.clone() for key, tensor in weights.tensors().items()}
    # The keys and values of the draft themselves are no numbers here.
    broken = {
        key: tensor * torch.nan if "k_proj" in key or "v_proj" in key else tensor for key, tensor in sound.items()
    }
    group = GroupRequest("g", (1, 2, 3), (1, 2), SamplingParams(max_new_tokens=12, temperature=0.0))
    core.take_over("draft", weights.build(broken), 1)
    assert all(sample.spec.num_nonfinite_rounds == 10 for sample in run(core, [group]).values())
    core.take_over("draft", weights.build(sound), 2)
    assert core.drafter.cache is not None
    for store in (core.drafter.cache.own, core.drafter.cache.prefixes):
        assert all(tensor.isfinite().all() for tensor in (*store.keys, *store.values))
    assert all(
        sample.spec.num_nonfinite_rounds == 0 < sample.spec.num_drafted for sample in run(core, [group]).values()
    )


def test_a_broken_draft_is_counted_and_leaves_no_trace_where_the_engine_decides(tmp_path: Path) -> None:
    """What a model without numbers says of its tokens must not enter the means that decide whether to draft."""
    config = drafting(tmp_path, "eagle3", num_steps=3)
    numbers = {"num_steps": None, "eagle_topk": None, "num_draft_tokens": None}
    same = {"history": False, "draft_model_quantization": UNQUANTIZED}
    core = make_core(replace(config, speculative=replace(config.speculative, **numbers, **same)))
    core.speculation.use_costs(RoundCosts(PassCurve(((1, 1.0), (64, 1.0)))), is_automatic=True, max_running=4)
    weights, controller = core.drafter.weights, core.speculation.controller
    assert weights is not None
    assert controller is not None
    sound = {key: tensor.clone() for key, tensor in weights.tensors().items()}
    broken = {key: tensor * torch.nan if "v_proj" in key else tensor for key, tensor in sound.items()}
    group = GroupRequest("g", (1, 2, 3), (1, 2), SamplingParams(max_new_tokens=12, temperature=0.0))
    core.take_over("draft", weights.build(broken), 1)
    for sample in run(core, [group]).values():
        assert sample.spec.num_nonfinite_rounds == 10
        assert sample.spec.num_drafted == 0
    assert all(map(isfinite, controller.acceptance.chain(3)))
    core.take_over("draft", weights.build(sound), 2)
    for sample in run(core, [group]).values():
        assert sample.spec.num_nonfinite_rounds == 0 < sample.spec.num_drafted


def test_a_listener_that_raises_ends_its_own_request_alone(engine: EmbeddedEngine) -> None:
    def raising(progress: Progress) -> None:
        raise KeyError("no such client")

    request = GroupRequest("g", (1, 2, 3), (1, 2), LONG)
    other, heard = engine.generate(request), engine.generate(replace(request, group_id="heard"), raising)
    with pytest.raises(GenerationError, match="on_progress of group heard raised KeyError"):
        list(heard)
    assert len(list(other)) == 2
    assert len(list(engine.generate(request))) == 2


@pytest.fixture
def hot_eagle(tmp_path: Path) -> Config:
    """A draft that keeps a copy of some rows of the target's head: it is cut anew for every push of the target."""
    torch.save(list(range(0, 131, 2)), tmp_path / "hot.pt")
    return make_format(tmp_path, "eagle").config(3, token_map=str(tmp_path / "hot.pt"))


@pytest.mark.parametrize("side", ["target", "draft"])
def test_a_push_that_cannot_be_built_leaves_both_sides_where_they_were_and_the_engine_serving(
    hot_eagle: Config, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = started(hot_eagle)
    before, checksums = generated(engine, 1.0), [engine.weights_checksum("target"), engine.weights_checksum("draft")]

    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    drafts = load_file(f"{hot_eagle.speculative.draft_model_path}/model.safetensors")
    weights = disturbed(drafts, 4) if side == "draft" else other_weights(Path(hot_eagle.model.hf_checkpoint), 4)
    patched = "network_weights.NetworkBuilder.build" if side == "draft" else "eagle.EagleDrafter._head_of"
    monkeypatch.setattr(f"rollout.embedded.drafters.{patched}", no_room)
    with pytest.raises(PushError, match="no memory left"):
        run_push(push_of(weights, 7, side), lambda message: [engine.update_weights(message)], pause_mode="retract")  # type: ignore[arg-type]
    assert (engine.stats().weight_version, engine.draft_version) == (0, 0)
    assert [engine.weights_checksum("target"), engine.weights_checksum("draft")] == checksums
    assert [sample.token_ids for sample in generated(engine, 1.0)] == [sample.token_ids for sample in before]
    engine.stop()


@pytest.mark.parametrize("side", ["target", "draft"])
def test_a_commit_builds_nothing(hot_eagle: Config, side: str) -> None:
    engine = started(hot_eagle)
    drafts = load_file(f"{hot_eagle.speculative.draft_model_path}/model.safetensors")
    weights = disturbed(drafts, 4) if side == "draft" else other_weights(Path(hot_eagle.model.hf_checkpoint), 4)

    def broadcast(message: PushMessage) -> list:
        if not isinstance(message, CommitPush):
            return [engine.update_weights(message)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rollout.embedded.linear.PackedLinear.__init__", None)  # what every linear is made with
            return [engine.update_weights(message)]

    run_push(push_of(weights, 7, side), broadcast, verify=True)  # type: ignore[arg-type]
    assert (engine.stats().weight_version, engine.draft_version) == ((7, 0) if side == "target" else (0, 7))
    assert len(generated(engine, 1.0)) == 3
    engine.stop()
