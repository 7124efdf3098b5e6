"""Training a draft: it learns, a restart changes nothing, and what it exports is what engines compute."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import load_draft, save_draft_checkpoint
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.tree import Config, ModelConfig, SpeculativeConfig
from slime_spec.draft.build import network_tensors
from slime_spec.draft.training.batch import TrainBatch, collate, epoch_batches
from slime_spec.draft.training.loss import StepTarget
from slime_spec.draft.training.run import STATE_FILE, Limits, judge_draft, load_state, save_state, train_draft
from slime_spec.draft.training.sequence import DraftSequence, is_held_out
from slime_spec.draft.training.trainer import DraftTrainer, TrainSettings, learning_rate
from slime_spec.draft.training.unrolled import num_learned, unrolled_loss
from slime_spec.draft.training.vocabulary import DraftVocabulary
from slime_spec.draft.unroll import Unroll
from slime_spec.errors import ConfigError
from slime_spec.types import GroupRequest
from tests.support.draft_training import Lesson, Silent, make_lesson, tiny_corpus
from tests.support.embedded_harness import greedy, make_core, run
from tests.support.tiny_drafts import edit_tensors
from tests.support.tiny_models import load_reference, make_tiny_checkpoint

DRAFT_VOCAB = 90
SETTINGS = TrainSettings(num_steps=3, epochs=12, batch_size=8, lr=3e-3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target whose next token depends on the last one alone: a map of tokens that a draft can learn in seconds."""
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("target") / "markov", num_hidden_layers=4)
    deaf = {f"model__layers__{layer}__self_attn__o_proj__weight": torch.zeros(48, 96) for layer in range(4)}
    return edit_tensors(folder, **deaf)


@pytest.fixture(scope="module")
def corpus(target: Path) -> list[DraftSequence]:
    return tiny_corpus(target)


def spec_of(target: Path, kind: str) -> DraftSpec:
    block = replace(ModelSpec.from_folder(target), num_layers=1)
    if kind == "mtp":
        return DraftSpec("mtp", block, 48, 131, hidden_first=True, recurrent_norm=True, zero_first_embedding=True)
    if kind == "eagle":
        return DraftSpec("eagle", block, 48, 131, logits_norm=False)
    if kind in ("dflash", "dspark"):
        qwen3 = replace(block, architecture="Qwen3ForCausalLM", num_layers=2, qk_norm=True)
        sizes = {"block_size": 6, "mask_token_id": 130, "num_target_layers": 4}
        if kind == "dspark":
            sizes |= {"block_size": 5, "drafts_from_root": True, "markov_rank": 8}
        return DraftSpec(kind, qwen3, 48, 131, capture_layers=(0, 2), **sizes)
    return DraftSpec("eagle3", block, 48, DRAFT_VOCAB, capture_layers=(0, 1, 2), has_own_head=True)


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory, target: Path, corpus: list[DraftSequence]) -> Lesson:
    return make_lesson(tmp_path_factory.mktemp("lesson"), target, spec_of(target, "eagle3"), corpus, DRAFT_VOCAB)


@pytest.fixture(scope="module", params=["eagle3", "eagle", "mtp", "dflash", "dspark"])
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, target: Path, corpus: list[DraftSequence]
) -> tuple[Lesson, DraftTrainer]:
    folder = tmp_path_factory.mktemp(request.param)
    lesson = make_lesson(folder, target, spec_of(target, request.param), corpus, DRAFT_VOCAB)
    model = lesson.new_model()
    return lesson, train_draft(model, SETTINGS, lesson.learned, lesson.store, folder, forever(), Silent())


def forever() -> Limits:
    return Limits(lambda: 0.0)


def ticking(stop_after: int) -> Limits:
    """A clock that a training reads past its deadline after ``stop_after`` updates (one look ahead of the first)."""

    def ticks() -> Iterator[float]:
        yield from (float(tick) for tick in range(1_000_000))

    clock = ticks()
    return Limits(lambda: next(clock), deadline_s=2.0 * stop_after + 1, save_every_s=float("inf"))


def one_batch(lesson: Lesson, count: int = 8) -> TrainBatch:
    return collate(lesson.learned[:count], lesson.store, CPU)


def test_training_lowers_the_held_out_loss_and_drafts_better_than_its_start(
    trained: tuple[Lesson, DraftTrainer],
) -> None:
    lesson, trainer = trained
    batch = collate(lesson.held_out, lesson.store, CPU)
    with torch.no_grad():
        before, after = (
            unrolled_loss(model, batch, SETTINGS.objective).loss for model in (lesson.new_model(), trainer.model)
        )
    assert after < 0.8 * before  # the rest is the entropy of the target

    def tokens_per_verify(model: object) -> float:
        served = model.over_all_tokens(lesson.target.head)  # type: ignore[attr-defined]
        tallies = judge_draft(served, lesson.held_out, lesson.store, 4, 3, Silent())
        return sum(each.num_tokens for each in tallies.values()) / sum(each.num_rounds for each in tallies.values())

    assert tokens_per_verify(trainer.model) > max(1.3, tokens_per_verify(lesson.new_model()))


def test_an_interrupted_training_ends_with_the_same_bits(lesson: Lesson, tmp_path: Path) -> None:
    settings = replace(SETTINGS, epochs=3)
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole = train_draft(
        lesson.new_model(), settings, lesson.learned, lesson.store, tmp_path / "whole", forever(), Silent()
    )
    stops = []
    for _ in range(3):
        trainer = train_draft(
            lesson.new_model(), settings, lesson.learned, lesson.store, tmp_path / "broken", ticking(4), Silent()
        )
        stops.append(trainer.step_number)
    assert stops[0] < stops[1] < stops[2] < whole.num_updates, "each run must be interrupted for this test to mean much"
    resumed = train_draft(
        lesson.new_model(), settings, lesson.learned, lesson.store, tmp_path / "broken", forever(), Silent()
    )
    assert resumed.step_number == whole.step_number == whole.num_updates
    ours, theirs = network_tensors(resumed.model.network), network_tensors(whole.model.network)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_training_started_with_other_settings_is_not_resumed(lesson: Lesson, tmp_path: Path) -> None:
    train_draft(lesson.new_model(), SETTINGS, lesson.learned, lesson.store, tmp_path, ticking(2), Silent())
    other = replace(SETTINGS, lr=1e-4)
    with pytest.raises(ConfigError, match=r"--lr: must be what the training was started with \(0.003\)"):
        train_draft(lesson.new_model(), other, lesson.learned, lesson.store, tmp_path, ticking(2), Silent())


def test_an_engine_accepts_what_held_out_acceptance_promises(
    trained: tuple[Lesson, DraftTrainer], target: Path, tmp_path: Path
) -> None:
    """The same rounds, drafted by the exported checkpoint in the engine."""
    lesson, trainer = trained
    model = trainer.model
    ids = model.vocabulary.target_ids if lesson.spec.has_own_head else None
    save_draft_checkpoint(tmp_path, lesson.spec, network_tensors(model.network), ids)
    algorithm = {"eagle3": "EAGLE3", "dflash": "DFLASH", "dspark": "DSPARK"}.get(lesson.spec.family, "NEXTN")
    steps = {} if lesson.spec.block_size else {"num_steps": 3, "eagle_topk": 1}
    config = Config(
        model=ModelConfig(hf_checkpoint=str(target)),
        speculative=SpeculativeConfig(algorithm=algorithm, draft_model_path=str(tmp_path), num_draft_tokens=4, **steps),
    )
    requests = [
        GroupRequest(str(each.index), each.token_ids[: each.prompt_len], (0,), greedy(len(each.reply)))
        for each in lesson.held_out
    ]
    samples = run(make_core(config), requests)
    served = model.over_all_tokens(lesson.target.head)
    tallies = judge_draft(served, lesson.held_out, lesson.store, 4, 3, Silent()).values()
    assert [samples[str(each.index), 0].token_ids for each in lesson.held_out] == [e.reply for e in lesson.held_out]
    counters = [sample.spec for sample in samples.values()]
    assert sum(each.num_rounds for each in counters) == sum(each.num_rounds for each in tallies)
    # The engine's last token is a bonus, whatever was drafted there; judged, it may be an accepted draft.
    promised = sum(sum(each.accepted) for each in tallies)
    assert 0 <= promised - sum(each.num_correct for each in counters) <= len(lesson.held_out)


@torch.no_grad()
def test_sampled_drafts_are_judged_by_the_probabilities_of_the_replys_own_tokens(lesson: Lesson) -> None:
    """From a pass over whole sequences, token by token, without the draft's reduced vocabulary in the way."""
    model = lesson.new_model()
    batch = collate(lesson.held_out[:3], lesson.store, CPU)
    forced = unrolled_loss(model, batch, replace(SETTINGS, num_steps=2).objective).quality
    head, seen = lesson.target.head, 0
    for b, sequence in enumerate(lesson.held_out[:3]):
        unroll = Unroll(model.network, model.embed, batch.starts[b : b + 1], batch.num_rows)
        known = lesson.store[sequence.index]
        for step in range(2):
            ids = torch.tensor([sequence.reply])
            shown = unroll.first(batch.features[b : b + 1], batch.token_ids[b : b + 1])
            for offset in range(1, step + 1):
                padded = torch.nn.functional.pad(ids[:, offset:], (0, batch.num_rows))[:, : batch.num_rows]
                shown = unroll.next(padded)
            q = model.logits(shown)[0].softmax(-1)
            for row in range(len(sequence.reply) - 1 - step):
                token = sequence.reply[row + 1 + step]
                place = (model.vocabulary.target_ids == token).nonzero().flatten()
                ratio = float(forced.log_ratios[b, row, step])
                if not len(place):
                    assert ratio == -math.inf
                    continue
                p = (head.float() @ known.final[row + step].float()).softmax(0)[token]
                assert ratio == pytest.approx(float((q[row, place[0]] / p).log()), abs=1e-4)
                seen += 1
    assert seen > 10


def test_the_exported_checkpoint_is_the_network(
    trained: tuple[Lesson, DraftTrainer], target: Path, tmp_path: Path
) -> None:
    lesson, trainer = trained
    ids = trainer.model.vocabulary.target_ids if lesson.spec.has_own_head else None
    save_draft_checkpoint(tmp_path, lesson.spec, network_tensors(trainer.model.network), ids)
    loaded = load_draft(tmp_path, DraftSpec.from_folder(tmp_path, ModelSpec.from_folder(target)))
    ours = network_tensors(trainer.model.network)
    assert loaded.tensors.keys() == ours.keys()
    assert all(torch.equal(loaded.tensors[name], ours[name]) for name in ours)
    if ids is not None:
        assert torch.equal(loaded.hot_token_ids, ids)


def test_the_draft_vocabulary_is_the_most_frequent_tokens_and_its_tables_agree() -> None:
    replies = [(5, 5, 5, 9, 9, 2), (2, 9, 7)]
    sequences = [DraftSequence(i, (1, *reply), 1, "x") for i, reply in enumerate(replies)]
    vocabulary = DraftVocabulary.most_frequent(sequences, vocab_size=12, size=4)
    assert vocabulary.target_ids.tolist() == [2, 5, 7, 9]  # 5 and 9 thrice, 2 twice, 7 once; the prompt's 1 never
    assert (torch.arange(4) + vocabulary.d2t).tolist() == vocabulary.t2d.nonzero().flatten().tolist() == [2, 5, 7, 9]
    padded = DraftVocabulary.most_frequent(sequences, vocab_size=12, size=6)
    assert padded.target_ids.tolist() == [0, 1, 2, 5, 7, 9]  # unseen tokens fill up, the lowest first
    assert DraftVocabulary.most_frequent(sequences, 12, 2).coverage(sequences) == pytest.approx(6 / 9)


def test_rows_count_where_root_and_prediction_are_in_the_reply(lesson: Lesson) -> None:
    batch = one_batch(lesson)
    for step in range(3):
        for b, sequence in enumerate(lesson.learned[:8]):
            for row in range(batch.num_rows):
                predicted = sequence.prompt_len + row + 1 + step
                assert bool(batch.valid(step)[b, row]) == (predicted < len(sequence.token_ids))
                if batch.valid(step)[b, row]:
                    assert int(batch.replies_from(step + 1)[b, row]) == sequence.token_ids[predicted]
                    assert int(batch.replies_from(0)[b, row]) == sequence.reply[row]


def test_what_no_row_counts_does_not_move_the_loss(lesson: Lesson) -> None:
    batch, model = one_batch(lesson), lesson.new_model()
    torch.nn.init.normal_(model.network.attention.o_proj.weight, std=0.1)  # this target's attention is zero
    loss = unrolled_loss(model, batch, SETTINGS.objective).loss
    final, features, token_ids = batch.final.clone(), batch.features.clone(), batch.token_ids.clone()
    for b, sequence in enumerate(lesson.learned[:8]):
        final[b, len(sequence.reply) - 1 :] = 7.0  # after the last token nothing is predicted
        features[b, len(sequence.token_ids) - 1 :] = 7.0  # and its features are nobody's context
        token_ids[b, len(sequence.token_ids) :] = 3
    changed = replace(batch, final=final, features=features, token_ids=token_ids)
    assert unrolled_loss(model, changed, SETTINGS.objective).loss == loss
    features[:, 0] += 1.0  # a prompt's features are context
    assert unrolled_loss(model, replace(changed, features=features), SETTINGS.objective).loss != loss


def test_the_policys_distribution_is_float32_where_the_draft_computes_in_bfloat16(lesson: Lesson) -> None:
    batch, model = one_batch(lesson), lesson.new_model()
    sharp = replace(batch, final=40 * batch.final)
    sharp = replace(sharp, logsumexp=(sharp.final @ lesson.target.head.T).logsumexp(-1))
    seen: list[StepTarget] = []

    def loss(draft_logits: torch.Tensor, target: StepTarget) -> torch.Tensor:
        seen.append(target)
        return draft_logits.sum(-1)

    objective = replace(SETTINGS.objective, loss=loss)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            unrolled_loss(model, sharp, objective)
    exact, under_autocast = seen[: SETTINGS.num_steps], seen[SETTINGS.num_steps :]
    for ours, theirs in zip(under_autocast, exact, strict=True):
        assert torch.equal(ours.p_target, theirs.p_target)


def test_rows_whose_target_is_outside_the_draft_vocabulary_do_not_count(lesson: Lesson) -> None:
    batch, model = one_batch(lesson), lesson.new_model()
    outside = int((~model.vocabulary.t2d).nonzero()[0])
    argmax = torch.full_like(batch.argmax, outside)
    assert unrolled_loss(model, replace(batch, argmax=argmax), SETTINGS.objective).loss == 0
    argmax[0, 0] = int(model.vocabulary.target_ids[0])
    assert unrolled_loss(model, replace(batch, argmax=argmax), SETTINGS.objective).loss > 0


def test_a_loss_of_replies_counts_the_rows_whose_token_the_draft_can_name(lesson: Lesson) -> None:
    batch, model = one_batch(lesson), lesson.new_model()
    objective = replace(SETTINGS, loss="cross_entropy", num_steps=1).objective
    outside = int((~model.vocabulary.t2d).nonzero()[0])
    batch.token_ids[0, lesson.learned[0].prompt_len + 1] = outside
    # The target's argmax is no matter.
    found = unrolled_loss(model, replace(batch, argmax=torch.full_like(batch.argmax, outside)), objective)
    sequence, row = batch.valid(0).nonzero(as_tuple=True)
    tokens = batch.replies_from(1)[sequence, row]
    log_p = (batch.final[sequence, row] @ lesson.target.head.T).log_softmax(-1)
    log_q = found.quality.log_ratios[sequence, row, 0] + log_p.gather(1, tokens[:, None])[:, 0]
    named = model.vocabulary.t2d[tokens]
    assert int(num_learned(model, batch, objective)) == int(named.sum()) < len(named)
    torch.testing.assert_close(found.loss, -log_q[named].mean())


def test_a_training_from_before_a_setting_goes_on_with_its_default(lesson: Lesson, tmp_path: Path) -> None:
    trainer = DraftTrainer(lesson.new_model(), SETTINGS, 10)
    save_state(trainer, tmp_path)
    state = torch.load(tmp_path / STATE_FILE, weights_only=True)
    del state["settings"]["loss_top_k"]
    torch.save(state, tmp_path / STATE_FILE)
    load_state(trainer, tmp_path)
    with pytest.raises(ConfigError, match="--loss-top-k"):
        load_state(DraftTrainer(lesson.new_model(), replace(SETTINGS, loss_top_k=3), 10), tmp_path)


def test_a_scaled_loss_scales_the_gradient_and_leaves_the_steps_of_adam(lesson: Lesson) -> None:
    """Where nothing is clipped; the loss that is reported is not scaled."""
    batch = one_batch(lesson)
    reports, weights = [], []
    for scale in (1.0, 0.25):
        trainer = DraftTrainer(lesson.new_model(), replace(SETTINGS, loss_scale=scale, clip_grad=1e9), None)
        reports.append(trainer.step(batch))
        weights.append(network_tensors(trainer.model.network))
    assert reports[1].loss == reports[0].loss
    assert reports[1].grad_norm == pytest.approx(0.25 * reports[0].grad_norm, rel=1e-5)
    before = network_tensors(lesson.new_model().network)
    for name, tensor in weights[0].items():
        moved = tensor - before[name]
        # AdamW's first step is lr times the gradient's sign, where that is well above its epsilon.
        assert (moved - (weights[1][name] - before[name])).abs().quantile(0.9) <= 1e-3 * SETTINGS.lr


def test_the_learning_rate_warms_up_and_falls_to_nothing() -> None:
    settings = TrainSettings(lr=1.0, warmup_ratio=0.1)
    rates = [learning_rate(step, 100, settings) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[10:] == sorted(set(rates[10:]), reverse=True)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)


def test_every_epoch_gives_every_sequence_once_in_an_order_of_its_own(corpus: list[DraftSequence]) -> None:
    epochs = [epoch_batches(corpus, 8, seed=0, epoch=epoch) for epoch in (0, 1)]
    for batches in epochs:
        assert sorted(each.index for batch in batches for each in batch) == [each.index for each in corpus]
    assert epochs[0] != epochs[1]
    assert epoch_batches(corpus, 8, seed=0, epoch=1) == epochs[1]


def test_no_prompt_is_learned_from_and_judged_by(corpus: list[DraftSequence], lesson: Lesson) -> None:
    def prompts(sequences: tuple[DraftSequence, ...]) -> set[tuple[int, ...]]:
        return {each.token_ids[: each.prompt_len] for each in sequences}

    assert prompts(lesson.learned) & prompts(lesson.held_out) == set()
    assert len(lesson.learned) + len(lesson.held_out) == len(corpus)
    shares = [is_held_out((i, i + 1), 5) for i in range(4000)]
    assert 0.03 < sum(shares) / len(shares) < 0.07  # a hash, five percent: 0.03 is six standard deviations away


def test_features_are_kept_in_files_and_computed_again_only_for_other_sequences(
    target: Path, corpus: list[DraftSequence], tmp_path: Path
) -> None:
    lesson = make_lesson(tmp_path, target, spec_of(target, "eagle3"), corpus, DRAFT_VOCAB)
    files = sorted((tmp_path / "features").iterdir())
    stamps = [file.stat().st_mtime_ns for file in files]
    lesson.store.compute(Silent())
    assert [file.stat().st_mtime_ns for file in files] == stamps
    changed = [*corpus[:-1], replace(corpus[-1], token_ids=(*corpus[-1].token_ids, 5))]
    make_lesson(tmp_path, target, spec_of(target, "eagle3"), changed, DRAFT_VOCAB)
    again = [file.stat().st_mtime_ns for file in files]
    assert again[:-1] == stamps[:-1]
    assert again[-1] != stamps[-1]


def test_features_are_the_targets_layers_and_its_logits(lesson: Lesson, target: Path) -> None:
    model, sequence = load_reference(target), lesson.learned[3]
    out = model(torch.tensor([sequence.token_ids]), output_hidden_states=True)
    known = lesson.store[sequence.index]
    expected = torch.cat([out.hidden_states[layer + 1][0] for layer in (0, 1, 2)], dim=-1)
    torch.testing.assert_close(known.features, expected, rtol=0, atol=1e-4)
    logits = out.logits[0, sequence.prompt_len :]
    torch.testing.assert_close(known.final @ lesson.target.head.T, logits, rtol=0, atol=1e-3)
    torch.testing.assert_close(known.logsumexp, logits.logsumexp(-1), rtol=0, atol=1e-4)
    assert known.argmax.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("kind", ["eagle3", "eagle", "mtp"])
def test_a_target_with_biases_and_untied_head_warms_a_draft_too(kind: str, tmp_path: Path) -> None:
    target = make_tiny_checkpoint(tmp_path / "qwen", "Qwen2ForCausalLM", num_hidden_layers=4)
    corpus = tiny_corpus(target, num_sequences=12, reply_len=8)
    spec = spec_of(target, kind)
    lesson = make_lesson(tmp_path, target, spec, corpus, DRAFT_VOCAB)
    network = lesson.new_model().network
    last = "model.layers.3.self_attn.k_proj.weight"
    columns = network.attention.k_proj.weight[:, -48:]
    assert torch.equal(columns, lesson.tensors[last])
    loss = unrolled_loss(lesson.new_model(), one_batch(lesson), SETTINGS.objective).loss
    assert torch.isfinite(loss)
