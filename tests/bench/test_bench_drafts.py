"""What the benchmark of drafts in RL makes of finished runs, and of a policy's replies."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slime_spec.bench.online_drafts.arms import ARMS
from slime_spec.bench.online_drafts.benchmark import measure_drift, measure_main_job, measure_mtp, measure_untrained
from slime_spec.bench.online_drafts.drift import CURRICULUM, STEPS_OF_STAGE
from slime_spec.bench.online_drafts.elsewhere import measure_elsewhere, rows_of
from slime_spec.bench.online_drafts.judged import Judge, _tempered
from slime_spec.bench.race import Answer
from slime_spec.bench.rows import BenchOptions, Row
from slime_spec.draft.training.batch import collate
from slime_spec.draft.training.loss import LOSSES
from slime_spec.draft.training.unrolled import Objective, unrolled_loss
from slime_spec.draft.unroll import Unroll
from slime_spec.types import Prompt
from tests.draft.test_draft_training import spec_of
from tests.support.draft_training import make_lesson, tiny_corpus
from tests.support.sglang_checkpoints import make_draft
from tests.support.tiny_models import make_tiny_checkpoint
from tests.support.tiny_policy import make_tiny_policy


def write_arm(folder: Path, name: str, served: list[float], reward: float = 0.5, rollout_s: float = 4.0) -> None:
    """A finished run: a step of 20 s trains 10 s, of which 1 s is the draft's, and pushes it in half a second."""
    (folder / name / "hf").mkdir(parents=True)
    rows = [
        {
            "step": step,
            **({} if name == "plain" else {"rollout/spec_accept_length": length}),
            **({} if name == "plain" else {"train/draft_accept_length/rejection": length / 2}),
            "perf/tokens_per_s": 100.0 * length,
            "rollout/reward_mean": reward,
            "perf/rollout_time": rollout_s,
            "perf/train_time": 10.0,
            "perf/draft_train_time": 1.0,
            "perf/draft_sync_time": 0.5,
            "perf/step_time": 20.0,
        }
        for step, length in enumerate(served)
    ]
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def by_id(rows: list[Row]) -> dict[str, Row]:
    return {row.id.removeprefix("drafts."): row for row in rows}


def test_arms_of_one_seed_are_compared_step_by_step(tmp_path: Path) -> None:
    write_arm(tmp_path, "plain", [1.0] * 10)
    write_arm(tmp_path, "frozen", [1.0] * 5 + [2.0] * 5)
    write_arm(tmp_path, "online", [1.0] * 5 + [2.5] * 4 + [3.0])
    rows = by_id(measure_main_job(BenchOptions(runs=(tmp_path,))))
    assert (rows["online.served.first"].value, rows["frozen.served.last"].value) == (1.0, 2.0)
    assert rows["online.rejection.last"].value == pytest.approx(1.3)
    assert rows["online_over_frozen.served"].value == pytest.approx((4 * 1.25 + 1.5) / 5)
    assert rows["online.train_share"].value == pytest.approx(0.1)
    assert rows["online.step_share"].value == pytest.approx(0.075)
    assert rows["online.reward_difference"].holds is rows["plain.reward_difference"].holds is True
    assert rows["online.tokens_per_s.last"].value == pytest.approx(260.0)
    assert rows["plain.tokens_per_s.last"].value == rows["plain.step_time.last"].value * 5 == 100.0
    assert not [name for name in rows if name.startswith(("plain.served", "plain.train_share"))]
    assert "learning with each step" in (tmp_path / "main-job.svg").read_text()


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_draws_its_tokens_by_races(name: str) -> None:
    """Without a draft too: other draws are other tokens for a seed, and other policies soon."""
    flags, _ = ARMS[name]
    assert {"--speculative-use-gumbel-coupling", "--no-speculative-use-rejection-sampling"} < {*flags}


def test_arms_whose_rewards_differ_by_anything_are_not_the_same_policy(tmp_path: Path) -> None:
    write_arm(tmp_path, "plain", [1.0] * 5, reward=0.5 - 1e-9)
    write_arm(tmp_path, "frozen", [1.0] * 5, reward=0.5)
    write_arm(tmp_path, "online", [1.0] * 5, reward=0.5 + 1e-9)
    rows = by_id(measure_main_job(BenchOptions(runs=(tmp_path,))))
    assert rows["online.reward_difference"].holds is rows["plain.reward_difference"].holds is False


def test_steps_in_which_a_draft_did_not_learn_are_compared_with_none(tmp_path: Path) -> None:
    """Its acceptance is known at the steps at which it learned: those alone are set against the same steps."""
    write_arm(tmp_path, "plain", [1.0] * 6)
    write_arm(tmp_path, "frozen", [2.0, 2.0, 2.0, 2.0, 1.0, 2.0])
    write_arm(tmp_path, "online", [4.0, 4.0, 4.0, 4.0, 3.0, 4.0])
    path = tmp_path / "online" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for step in (0, 1, 2, 3, 5):
        del rows[step]["train/draft_accept_length/rejection"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = by_id(measure_main_job(BenchOptions(runs=(tmp_path,))))
    assert made["online_over_frozen.rejection"].value == 3.0
    assert made["online.rejection.last"].value == 1.5
    assert made["online_over_frozen.served"].value == pytest.approx((4 * 2 + 3) / 5)


def test_an_untrained_draft_is_judged_after_six_steps_and_at_the_end(tmp_path: Path) -> None:
    write_arm(tmp_path, "untrained", [1.0, 1.1, 1.2, 1.3, 1.4, 2.3, 2.4, *[2.9] * 5])
    rows = by_id(measure_untrained(BenchOptions(runs=(tmp_path,))))
    assert (rows["untrained.few_steps"].value, rows["untrained.few_steps"].holds) == (2.3, True)
    assert (rows["untrained.end"].value, rows["untrained.end"].holds) == (pytest.approx(2.9), True)


def test_an_mtp_layer_that_learns_is_compared_with_one_that_stays(tmp_path: Path) -> None:
    write_arm(tmp_path, "mtp_frozen", [1.5] * 6)
    write_arm(tmp_path, "mtp_online", [1.5] + [1.8] * 5)
    rows = by_id(measure_mtp(BenchOptions(runs=(tmp_path,))))
    assert rows["mtp_online_over_frozen.served"].value == pytest.approx(1.2)
    assert rows["mtp_online.reward_difference"].holds is True
    assert "an MTP layer, as it is" in (tmp_path / "mtp.svg").read_text()


def test_after_a_change_of_task_it_counts_what_three_steps_bring(tmp_path: Path) -> None:
    stage = [2.0, 2.0, 2.0, 2.4, 2.4, 2.4, 2.4, 3.0]
    for name, length in (("drift_frozen", [2.0] * 24), ("drift_online", stage * 3), ("drift_paying", stage * 3)):
        write_arm(tmp_path, name, length, rollout_s=4.0 if name == "drift_frozen" else 3.0)
    rows = by_id(measure_drift(BenchOptions(runs=(tmp_path,))))
    assert rows["drift_online.stage2.caught_up"].value == pytest.approx(2.4 / 3.0)
    assert rows["drift_online.stage3.last"].value == pytest.approx((2.4 + 2.4 + 3.0) / 3)
    assert "drift_online.stage1.caught_up" not in rows
    assert rows["drift_paying.rollouts_gained"].value == pytest.approx(24.0)
    assert rows["drift_paying.spent"].value == pytest.approx(36.0)


def test_the_curriculum_changes_its_task_after_so_many_steps_of_prompts() -> None:
    of_stage = 8 * STEPS_OF_STAGE
    texts = [CURRICULUM.problem(index, 0).text for index in (0, of_stage - 1, of_stage, 2 * of_stage, 9 * of_stage)]
    assert [text.split()[0] for text in texts] == ["What", "What", "¿Cuánto", "What", "What"]
    assert ["JSON" in text for text in texts] == [False, False, False, True, True]
    problem = CURRICULUM.problem(2 * of_stage, 0)
    prompt = Prompt(2 * of_stage, "curriculum", problem.text, (1,), problem.answer)
    assert CURRICULUM.reward(prompt, f'{{"first": 1, "sum": {problem.answer}}}') == 1.0
    assert CURRICULUM.reward(prompt, "none") == 0.0


def test_a_tempered_draft_draws_from_its_own_logits_and_is_judged_by_the_policys_distribution(tmp_path: Path) -> None:
    target = make_tiny_checkpoint(tmp_path / "target", num_hidden_layers=4)
    lesson = make_lesson(tmp_path, target, spec_of(target, "eagle3"), tiny_corpus(target, 6), 90)
    model = lesson.new_model()
    batch = collate(lesson.learned[:1], lesson.store, torch.device("cpu"))
    objective = Objective(LOSSES["total_variation"], 1, 1.0)
    with torch.no_grad():
        own, cool = (
            unrolled_loss(each, batch, objective).quality.log_ratios for each in (model, _tempered(model, 0.5))
        )
    drafted = model.vocabulary.draft_ids[torch.tensor(lesson.learned[0].reply[1:])]
    known = drafted >= 0
    assert int(known.sum()) > 3
    # log q at 1 and at 1/2 of all tokens of the vocabulary differ as the softmax says; log p is in both.
    with torch.no_grad():
        unroll_logits = logits_of(model, batch)
        expected = (2 * unroll_logits).log_softmax(-1) - unroll_logits.log_softmax(-1)
    gained = expected.gather(1, drafted.clamp(min=0)[:, None])[:, 0]
    torch.testing.assert_close((cool - own)[0, :, 0][known], gained[known].float())


def logits_of(model, batch):  # type: ignore[no-untyped-def]
    unroll = Unroll(model.network, model.embed, batch.starts, batch.num_rows)
    return model.logits(unroll.first(batch.features, batch.token_ids))[0]


def test_a_judge_never_promises_more_than_its_ceiling(tmp_path: Path) -> None:
    policy = make_tiny_policy(tmp_path / "policy", num_hidden_layers=4)
    draft = make_draft(tmp_path / "draft", policy, "EAGLE3", draft_vocab_size=200)
    judge = Judge(policy, replace(BenchOptions(), seeds=(0,)), num_prompts=3, depth=3)
    assert len(judge.sequences) > 10
    rounds = [-(-(len(each.reply) - 1) // 4) for each in judge.sequences]
    assert judge.ceiling == pytest.approx(sum(len(each.reply) - 1 for each in judge.sequences) / sum(rounds))
    judged = judge(str(draft))
    assert len(judged) == 8
    for (rule, temperature), length in judged.items():
        assert 1.0 <= length <= judge.ceiling
        if rule == "rejection":
            assert length <= judged["block", temperature] + 1e-9


def test_engines_of_others_are_compared_by_replies_and_passes() -> None:
    """Two replies of 4 and 7 tokens: 9 behind the prefills' own, in 3 of our passes and in 4 of theirs."""
    ours = Answer([(1, 2, 3, 4), (5, 6, 7, 8, 9, 10, 11)], 3)
    theirs = Answer([(1, 2, 3, 4), (5, 6, 7, 8, 9, 10, 12)], 4)
    rows = {row.id.removeprefix("drafts.elsewhere."): row for row in rows_of(ours, theirs)}
    assert (rows["same"].value, rows["ours"].value, rows["vllm"].value) == (1, 3.0, 2.25)
    assert rows["vllm_over_ours"].value == 0.75
    assert not rows["vllm_over_ours"].holds


def test_without_vllm_one_row_says_so(tmp_path: Path) -> None:
    (row,) = measure_elsewhere(BenchOptions(peers=tmp_path, runs=(tmp_path,)))
    assert math.isnan(row.value)
    assert "not installed" in row.what
