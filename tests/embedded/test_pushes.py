"""Pushes to a working engine: pauses, versions token by token, and the draft's own weights."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from time import perf_counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from rollout.embedded.assemble import Assembly
from rollout.embedded.core import GenerationCore
from rollout.embedded.drafting import DraftContext
from rollout.embedded.engine import EmbeddedEngine
from rollout.embedded.model import Decoder
from rollout.embedded.unread import AnyDraft
from slime_spec.checkpoints.tensors import expected_shapes
from slime_spec.config.tree import Config, ModelConfig, SpeculativeConfig
from slime_spec.errors import PushError
from slime_spec.transports.ipc import IpcTransport
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams
from slime_spec.weights.messages import (
    BeginPush,
    ContinueGeneration,
    PauseGeneration,
    PauseMode,
    PushMessage,
    Side,
    VerifyPush,
)
from slime_spec.weights.run import PushReport, push_messages, run_push
from tests.support.draft_formats import make_format
from tests.support.embedded_harness import engine_config, make_core, random_prompt, run
from tests.support.fp8_on_cpu import fp8_on_cpu
from tests.support.pushes import DirectTransport, checksum_of, disturbed, other_weights, push_of
from tests.support.tiny_models import load_reference, make_tiny_checkpoint

GROUP = GroupRequest("g", random_prompt(12, seed=1), (1, 2, 3), SamplingParams(max_new_tokens=30))
SINGLE = replace(GROUP, group_id="s", seeds=(9,))


def decoder_of(folder: Path, weights: dict[str, torch.Tensor]) -> Decoder:
    assembly = Assembly(engine_config(folder))
    builder = assembly.builder(assembly.device)
    for name, tensor in weights.items():
        builder.add(name, tensor)
    return builder.finish()


def reference_logprobs(folder: Path, weights: dict[str, torch.Tensor], sample: GeneratedSample) -> torch.Tensor:
    """Of every generated token, from one fresh forward over the whole sequence."""
    model = load_reference(folder)
    model.load_state_dict(weights)
    prompt = GROUP.prompt_token_ids
    with torch.no_grad():
        logits = model(torch.tensor([prompt + sample.token_ids])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(sample.token_ids).unsqueeze(1)).squeeze(1)


def push_midway(core: GenerationCore, decoder: Decoder, mode: PauseMode | None) -> list[GeneratedSample]:
    """Samples of a group and of a single, with version 5 taken over after ten steps."""
    samples: list[GeneratedSample] = []
    for request in (GROUP, SINGLE):
        core.add(request, samples.append)
    for _ in range(10):
        core.step()
    if mode is not None:
        core.pause(mode)
    core.use(decoder, 5)
    core.resume()
    while core.has_work:
        core.step()
    return samples


@pytest.mark.parametrize("mode", [None, "in_place", "retract"])
def test_every_token_knows_the_version_that_gave_it(tiny_llama: Path, mode: PauseMode | None) -> None:
    old, new = load_file(tiny_llama / "model.safetensors"), other_weights(tiny_llama, seed=5)
    samples = push_midway(make_core(engine_config(tiny_llama)), decoder_of(tiny_llama, new), mode)
    assert len(samples) == 4
    for sample in samples:
        assert sample.version_spans == ((0, 0), (11, 5))
        assert sample.weight_version == 0
        logprobs = torch.tensor(sample.logprobs)
        assert (logprobs[:11] - reference_logprobs(tiny_llama, old, sample)[:11]).abs().max() < 1e-4
        # Retracted, all KV is of the new weights; kept in place, the later tokens still look at the older ones' KV.
        apart = (logprobs[11:] - reference_logprobs(tiny_llama, new, sample)[11:]).abs().max()
        assert apart < 1e-4 if mode == "retract" else apart > 1e-2


def test_a_sample_of_one_version_has_no_spans_and_one_prefilled_by_an_older_one_has(tiny_llama: Path) -> None:
    decoder = decoder_of(tiny_llama, other_weights(tiny_llama, seed=5))
    core = make_core(engine_config(tiny_llama))
    core.use(decoder, 3)
    (sample,) = run(core, [SINGLE]).values()
    assert (sample.weight_version, sample.version_spans) == (3, ())
    late = make_core(engine_config(tiny_llama, max_running_requests=1))  # the second sample starts from kept logits
    samples: list[GeneratedSample] = []
    late.add(replace(GROUP, seeds=(1, 2)), samples.append)
    late.step()
    late.use(decoder, 3)
    while late.has_work:
        late.step()
    assert [sample.version_spans for sample in samples] == [((0, 0), (2, 3)), ((0, 0), (1, 3))]
    assert [sample.weight_version for sample in samples] == [0, 0]


def test_a_sample_whose_old_kv_was_recomputed_still_says_that_it_shaped_its_tokens(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout.embedded.prefill.CHUNK_TOKENS_ALONE", 5)
    core = make_core(engine_config(tiny_llama))
    samples: list[GeneratedSample] = []
    core.add(SINGLE, samples.append)
    core.step()  # five tokens of the prompt
    core.use(decoder_of(tiny_llama, other_weights(tiny_llama, seed=5)), 5)
    while core.batch.num_running == 0:
        core.step()
    core.pause("retract")
    core.resume()
    while core.has_work:
        core.step()
    assert [(sample.weight_version, sample.version_spans) for sample in samples] == [(0, ((0, 5),))]


def test_a_sample_that_never_began_is_of_the_weights_in_use(tiny_llama: Path) -> None:
    core = make_core(engine_config(tiny_llama))
    core.use(decoder_of(tiny_llama, other_weights(tiny_llama, seed=5)), 5)
    samples: list[GeneratedSample] = []
    core.abort(core.add(GROUP, samples.append))
    assert [(sample.weight_version, sample.version_spans) for sample in samples] == [(5, ())] * 3


def test_a_retracted_group_that_waits_is_prefilled_and_drawn_with_the_new_weights_alone(tiny_llama: Path) -> None:
    new = other_weights(tiny_llama, seed=5)
    core = make_core(engine_config(tiny_llama, max_running_requests=1))
    samples: list[GeneratedSample] = []
    core.add(replace(GROUP, seeds=(1, 2)), samples.append)
    core.step()
    core.pause("retract")
    core.use(decoder_of(tiny_llama, new), 3)
    core.resume()
    while core.has_work:
        core.step()
    assert [(sample.weight_version, sample.version_spans) for sample in samples] == [(0, ((0, 0), (2, 3))), (3, ())]
    expected = reference_logprobs(tiny_llama, new, samples[1])
    assert (torch.tensor(samples[1].logprobs) - expected).abs().max() < 1e-4


@pytest.fixture
def engine(tiny_llama: Path) -> Iterator[EmbeddedEngine]:
    engine = EmbeddedEngine(engine_config(tiny_llama, "LOOKUP", max_total_tokens=3000), 4, DirectTransport())
    engine.start()
    yield engine
    engine.stop()


@pytest.mark.parametrize("side", ["target", "draft"])
def test_a_push_through_memory_that_is_written_again_leaves_the_engine_with_its_own_copy(
    tiny_llama: Path, standalone: Config, side: Side
) -> None:
    """Parts of fused modules are in different buckets, and the third takes the memory of the first."""
    engine = EmbeddedEngine(standalone, 0, IpcTransport())
    engine.start()
    folder = tiny_llama if side == "target" else Path(standalone.speculative.draft_model_path)
    pushes = push_messages(other_weights(folder, seed=3), 1, side, 5000, IpcTransport())
    try:
        report = run_push(pushes, lambda message: [engine.update_weights(message)], verify=True)
        assert report.verified
        assert (engine.stats().weight_version, engine.draft_version) == ((1, 0) if side == "target" else (0, 1))
    finally:
        engine.stop()


@pytest.mark.parametrize("mode", ["retract", "in_place", "abort"])
def test_a_paused_push_stops_the_engine_from_before_the_begin_until_after_the_commit(
    tiny_llama: Path, engine: EmbeddedEngine, mode: PauseMode
) -> None:
    request = GroupRequest("g", (1, 2, 3), (1, 2, 3, 4), SamplingParams(max_new_tokens=400))
    started = Event()
    generation = engine.generate(request, lambda progress: started.set())
    assert started.wait(timeout=60)
    seen: list[PushMessage] = []
    progress: list[int] = []

    def broadcast(message: PushMessage) -> list:
        seen.append(message)
        replies = [engine.update_weights(message)]
        progress.append(sum(sequence.num_generated for sequence in engine._core.batch.sequences))
        return replies

    report = run_push(push_of(other_weights(tiny_llama, seed=4), 1), broadcast, verify=True, pause_mode=mode)
    assert seen[0] == PauseGeneration(1, mode)
    assert isinstance(seen[1], BeginPush)
    assert seen[-2:] == [VerifyPush(1), ContinueGeneration(1)]
    assert len(set(progress[:-1])) == 1, "tokens were generated during the pause"
    assert report.paused_s > report.seconds > 0
    samples = list(generation)
    assert len(samples) == 4
    if mode == "abort":
        assert {(sample.finish_reason, sample.weight_version) for sample in samples} == {("abort", 0)}
        assert all(sample.version_spans == () for sample in samples)
    else:
        assert {(len(sample.token_ids), sample.weight_version) for sample in samples} == {(400, 0)}
        assert {[version for _, version in sample.version_spans][-1] for sample in samples} == {1}


def test_requests_that_come_during_a_pause_wait_and_can_be_aborted(engine: EmbeddedEngine) -> None:
    engine.update_weights(PauseGeneration(1, "retract"))
    request = GroupRequest("g", (1, 2, 3), (1,), SamplingParams(max_new_tokens=5))
    waiting, aborted = engine.generate(request), engine.generate(request)
    aborted.abort()
    assert [sample.finish_reason for sample in aborted] == ["abort"]
    assert (engine.stats().num_running, engine.stats().num_waiting) == (0, 1)
    engine.ping()  # the loop answers, and does not spin
    busy = engine.stats().time_total_s
    engine.update_weights(PauseGeneration(1, "in_place"))
    assert engine.stats().time_total_s == busy
    engine.update_weights(ContinueGeneration(1))
    assert len(next(iter(waiting)).token_ids) == 5
    engine.update_weights(ContinueGeneration(1))


def test_after_a_failed_push_a_paused_engine_goes_on_with_its_old_weights(
    tiny_llama: Path, engine: EmbeddedEngine
) -> None:
    *begin_and_buckets, commit = push_of(other_weights(tiny_llama, seed=4), 1)
    with pytest.raises(PushError, match="ended without"):
        run_push(
            [*begin_and_buckets[:-1], commit], lambda message: [engine.update_weights(message)], pause_mode="retract"
        )
    sample = next(iter(engine.generate(GroupRequest("g", (1, 2), (1,), SamplingParams(max_new_tokens=3)))))
    assert (sample.weight_version, len(sample.token_ids)) == (0, 3)


def test_an_engine_that_cannot_pause_fails_the_push_before_it_begins(tiny_llama: Path) -> None:
    seen: list[PushMessage] = []

    def broadcast(message: PushMessage) -> list:
        seen.append(message)
        raise OSError("engine lost")

    with pytest.raises(PushError, match="could not pause for the push of version 1: engine lost"):
        run_push(push_of(other_weights(tiny_llama, seed=4), 1), broadcast, pause_mode="in_place")
    assert seen == [PauseGeneration(1, "in_place"), ContinueGeneration(1)]


@pytest.fixture
def standalone(tiny_llama: Path, tmp_path: Path) -> Config:
    draft = make_tiny_checkpoint(tmp_path / "draft", num_hidden_layers=1)
    speculative = SpeculativeConfig(algorithm="STANDALONE", draft_model_path=str(draft), num_steps=3, eagle_topk=1)
    return replace(engine_config(tiny_llama), speculative=speculative)


def test_the_draft_is_pushed_by_itself_and_has_a_version_of_its_own(standalone: Config) -> None:
    engine = EmbeddedEngine(standalone, 0, DirectTransport())
    engine.start()
    drafts = load_file(f"{standalone.speculative.draft_model_path}/model.safetensors")
    assert engine.draft_shapes == {name: tuple(tensor.shape) for name, tensor in drafts.items()}
    assert engine.weights_checksum("draft") == checksum_of(drafts)
    before = next(iter(engine.generate(SINGLE)))
    pushed = disturbed(drafts, seed=8)
    run_push(push_of(pushed, 7, "draft"), lambda message: [engine.update_weights(message)], verify=True)
    after = next(iter(engine.generate(SINGLE)))
    assert (after.token_ids, after.weight_version) == (before.token_ids, 0)
    assert (before.draft_version, after.draft_version) == (0, 7)
    assert (engine.stats().weight_version, engine.stats().draft_version, engine.draft_version) == (0, 7, 7)
    assert engine.weights_checksum("draft") == checksum_of(pushed)
    assert 0 < engine.stats().time_in_draft_s < engine.stats().time_total_s
    for tensor in pushed.values():
        tensor.zero_()
    assert engine.weights_checksum("draft") != checksum_of(pushed), "the engine kept a reference into pushed memory"
    engine.stop()


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_a_rounded_draft_takes_a_push_and_is_not_said_to_be_verified(standalone: Config, quantization: str) -> None:
    speculative = replace(standalone.speculative, draft_model_quantization=quantization)
    with fp8_on_cpu():
        engine = EmbeddedEngine(replace(standalone, speculative=speculative), 0, DirectTransport())
        engine.start()
    drafts = load_file(f"{standalone.speculative.draft_model_path}/model.safetensors")

    def push(tensors: dict[str, torch.Tensor], version: int, side: Side) -> PushReport:
        messages = push_of(tensors, version, side)
        return run_push(messages, lambda message: [engine.update_weights(message)], verify=True)

    assert not push(disturbed(drafts, seed=8), 7, "draft").verified
    assert engine.draft_version == 7
    targets = load_file(f"{standalone.model.hf_checkpoint}/model.safetensors")
    assert push(targets, 1, "target").verified
    engine.stop()


def test_a_push_of_a_draft_that_does_not_fit_is_refused_by_name(standalone: Config, engine: EmbeddedEngine) -> None:
    drafts = load_file(f"{standalone.speculative.draft_model_path}/model.safetensors")
    begin, *_ = push_of(drafts, 1, "draft")
    with pytest.raises(PushError, match=r"speculative\.algorithm LOOKUP has no weights"):
        engine.update_weights(begin)
    with_draft = EmbeddedEngine(standalone, 0, DirectTransport())
    with_draft.start()
    lacking = {name: tensor for name, tensor in drafts.items() if name != "model.norm.weight"}
    with pytest.raises(PushError, match=r"lacks model\.norm\.weight"):
        with_draft.update_weights(push_of(lacking, 1, "draft")[0])
    with_draft.stop()


def test_progress_streams_every_token_before_its_sample_is_delivered(engine: EmbeddedEngine) -> None:
    request = GroupRequest("g", (1, 2, 3, 1, 2), (1, 2), SamplingParams(max_new_tokens=40))
    heard: dict[int, list[tuple[int, float]]] = {0: [], 1: []}
    rounds = []

    def hear(progress) -> None:  # type: ignore[no-untyped-def]
        rounds.append(perf_counter())
        heard[progress.sample_index] += zip(progress.token_ids, progress.logprobs, strict=True)

    for sample in engine.generate(request, hear):
        assert heard[sample.sample_index] == list(zip(sample.token_ids, sample.logprobs, strict=True))
        assert sample.spec.num_rounds + 1 <= len(rounds)


def drafts_of(core: GenerationCore) -> list[tuple[int, ...]]:
    """Everything its drafter proposes for one request."""
    drafts: list[tuple[int, ...]] = []
    propose = core.drafter.propose

    def recorded(contexts: Sequence[DraftContext]) -> Sequence[AnyDraft]:
        proposed = propose(contexts)
        drafts.extend(draft.read().token_ids for draft in proposed)
        return proposed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core.drafter, "propose", recorded)
        run(core, [SINGLE])
    return drafts


@pytest.mark.parametrize("name", ["eagle3", "eagle", "nextn in a folder of its own", "mimo", "dflash", "dspark"])
def test_after_a_push_of_the_target_the_draft_computes_with_the_tensors_it_shares_with_it(
    tmp_path: Path, name: str
) -> None:
    """Embedding, head and slices of it: a draft with stale ones would draft other tokens."""
    tiny = make_format(tmp_path, name)
    config = tiny.config(num_steps=3)
    on_disk = load_file(tiny.target / "model.safetensors")
    weights = disturbed({key: on_disk[key] for key in expected_shapes(Assembly(config).spec)}, seed=3)
    shutil.copytree(tiny.target, tmp_path / "fresh")
    save_file({**on_disk, **weights}, tmp_path / "fresh" / "model.safetensors")
    fresh = make_core(replace(config, model=ModelConfig(hf_checkpoint=str(tmp_path / "fresh"))))
    pushed, untouched = make_core(config), make_core(config)
    pushed.use(decoder_of(tiny.target, weights), 1)
    assert drafts_of(pushed) == drafts_of(fresh) != drafts_of(untouched)
    assert len(drafts_of(pushed)[0]) == 3
