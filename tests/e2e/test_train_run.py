"""The main job on a tiny policy: every part, from the command line."""

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slime_spec.launch.compose import compose
from slime_spec.metrics.jsonl import read_metrics
from slime_spec.rl.rollout_data import load_rollout

STEPS = 3
# A cool temperature makes a random policy repeat itself, so that lookup has something to find.
SHARED = (
    "trainer.metrics_of_all_samples=true",  # compares logprobs also where a group's rewards are equal
    *("--speculative-algorithm", "LOOKUP", "--sp-min-token-match", "1", "--lr", "1e-3"),
    *("--speculative-num-steps", "4"),  # else a tiny model on a busy machine may not draft at all
    *("--rollout-temperature", "0.3", "--rollout-max-response-len", "24"),
)


@pytest.fixture(scope="module")
def finished(slime_spec, graded, tmp_path_factory) -> Path:
    """An uninterrupted run with two engines that map the pushes, lookup speculation, checkpoints, samples and wandb."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    data = folder.parent / "rollout_{rollout_id}.pt"
    slime_spec(
        "train",
        *SHARED,
        *graded,
        *("--num-rollout", str(STEPS), "--rollout-num-engines", "2", "--save-interval", "1", "--save-samples"),
        *("--push-transport", "ipc"),
        *("--use-wandb", "--use-tensorboard", "--save-debug-rollout-data", str(data), "--output-dir", str(folder)),
    )
    return folder


def rows(folder: Path) -> list[dict[str, float]]:
    return read_metrics(folder / "metrics.jsonl")


def test_every_step_trains_and_brings_the_engines_to_the_next_version(finished):
    metrics = rows(finished)
    assert len(metrics) == STEPS
    for step, row in enumerate(metrics):
        assert row["rollout/num_samples"] == 4
        assert row["rollout/weight_version_min"] == row["rollout/weight_version_max"] == step
        assert row["sync/weight_version"] == step + 1
        assert row["sync/checksum_ok"] == 1
        assert row["train/num_optimizer_steps"] == 1
        assert row["perf/rollout_time"] + row["perf/train_time"] + row["perf/sync_time"] <= row["perf/step_time"]


def test_the_runs_page_and_its_event_files_have_the_rows_of_metrics_jsonl(finished):
    page = (finished / "report.html").read_text()
    assert f"{STEPS} of {STEPS} steps, finished" in page
    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    for name in ("rollout/reward_mean", "rollout/spec_accept_length", "perf/step_time"):
        values = [row[name] for row in rows(finished) if name in row]
        assert [event.value for event in events.Scalars(name)] == pytest.approx(values, rel=1e-6)
        assert f'<data value="{values[-1]}">' in page


def test_the_trainers_logprobs_are_the_rollouts_on_every_step(finished):
    assert all(row["train/train_rollout_logprob_abs_diff"] < 1e-4 for row in rows(finished))


def test_speculation_ran_and_its_counters_add_up(finished):
    metrics = rows(finished)
    assert sum(row["spec/correct_drafts"] for row in metrics) > 0
    for row in metrics:
        assert row["rollout/spec_accept_rate"] == row["spec/correct_drafts"] / row["spec/proposed_drafts"]


def test_the_engines_tell_that_they_speculate_what_it_costs_and_that_none_restarted(finished):
    metrics = rows(finished)
    assert all(row["engine/speculating"] == 1 and row["engine/restarts"] == 0 for row in metrics)
    shares = [(row["perf/engine_draft_share"], row["perf/engine_forward_share"]) for row in metrics]
    assert all(draft > 0 and forward > 0 and draft + forward < 1 for draft, forward in shares), shares
    probed = [row for row in metrics if "spec/break_even_length" in row]
    assert probed
    assert all(row["spec/net_speedup_est"] > 0 for row in probed)


def test_the_export_is_the_trained_policy_under_the_names_it_came_with(finished, policy):
    before, after = load_file(policy / "model.safetensors"), load_file(finished / "hf" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in before.items()} == {n: t.shape for n, t in after.items()}
    assert any(not before[name].equal(after[name]) for name in before)
    assert (finished / "hf" / "tokenizer.json").read_bytes() == (policy / "tokenizer.json").read_bytes()


def test_the_run_folder_reloads_to_the_same_configuration(finished):
    config = compose(["--config", str(finished / "config.yaml")])
    assert config.run.output_dir == str(finished)
    assert config.rollout.num_engines == 2
    assert yaml.safe_load((finished / "config.yaml").read_text())["speculative"]["algorithm"] == "LOOKUP"
    assert json.loads((finished / "versions.json").read_text())["packages"]["torch"]


def test_samples_are_written_with_texts_rewards_and_meta_info(finished):
    lines = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == STEPS * 4
    assert {line["rollout_id"] for line in lines} == set(range(STEPS))
    assert all(line["meta_info"]["completion_tokens"] >= 1 for line in lines)


def loss_bound(row: dict[str, float]) -> float:
    """How far engines' rounding can move an on-policy loss, which is a sum that cancels.

    The loss is -mean(A exp(d)) with d the trainer's logprob minus the engine's, which varies with what else is in the
    engine's batch. To first order it moves by at most max |A| mean |d|, and in groups of two |A| is at most 1.
    """
    return row["train/train_rollout_logprob_abs_diff"]


def test_a_resumed_run_repeats_the_uninterrupted_ones_next_steps(finished, slime_spec, graded, tmp_path):
    second = tmp_path / "second"
    slime_spec(
        "train",
        *SHARED,
        *graded,
        "--num-rollout",
        "3",
        "--load",
        str(finished / "checkpoints" / "step-000001"),
        "--output-dir",
        str(second),
        *("--push-transport", "collective"),
    )
    resumed, whole = rows(second), rows(finished)[1:]
    assert len(resumed) == STEPS - 1
    for ours, theirs in zip(resumed, whole, strict=True):
        for name in ("rollout/reward_mean", "rollout/num_tokens", "sync/weight_version"):
            assert ours[name] == theirs[name], name
        for name in ("train/grad_norm", "train/entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
        assert abs(ours["train/loss"] - theirs["train/loss"]) <= loss_bound(ours) + loss_bound(theirs)


def test_saved_rollouts_train_without_engines(finished, slime_spec, graded, tmp_path):
    template = str(finished.parent / "rollout_{rollout_id}.pt")
    assert len(load_rollout(template, 0)) == 4
    slime_spec(
        "train",
        *SHARED,
        *graded,
        *("--debug-train-only", "--load-debug-rollout-data", template, "--num-rollout", str(STEPS)),
        *("--output-dir", str(tmp_path / "run")),
    )
    for ours, theirs in zip(rows(tmp_path / "run"), rows(finished), strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4, abs=1e-6)
        assert "sync/seconds" not in ours


def test_rollout_only_needs_no_trainer_and_gives_the_samples_one_engine_more_gives(
    finished, slime_spec, graded, tmp_path
):
    done = slime_spec("rollout", *SHARED, *graded, "--num-rollout", "1", "--output-dir", str(tmp_path / "run"))
    (row,) = rows(tmp_path / "run")
    assert not any(name.startswith(("train/", "sync/")) for name in row)
    assert "RankActor" not in done.stderr

    def replies(folder: Path) -> list[str]:
        lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        return [line["reply"] for line in lines if line["rollout_id"] == 0]

    assert replies(tmp_path / "run") == replies(finished)


def test_a_reward_that_raises_or_is_not_a_number_costs_the_sample_and_not_the_run(slime_spec, tmp_path):
    (tmp_path / "my_rewards.py").write_text(
        "def flaky(prompt, reply):\n"
        "    if prompt.prompt_id % 2:\n"
        "        raise RuntimeError('no verdict')\n"
        "    return float('nan') if len(reply) % 2 else float(len(reply))\n"
    )
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {i}", "label": str(i)}) + "\n" for i in range(4)))
    done = slime_spec(
        "train",
        *("--num-rollout", "2", "--prompt-data", str(data), "--custom-rm-path", "my_rewards:flaky", "--save-samples"),
        *("--n-samples-per-prompt", "6", "--output-dir", str(tmp_path / "run")),
        PYTHONPATH=str(tmp_path),
    )
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    excluded = [sample for sample in samples if sample["reward"] is None]
    assert any("no verdict" in sample["error"] for sample in excluded)
    assert sum(row["rollout/num_excluded"] for row in rows(tmp_path / "run")) == len(excluded) > 0
    assert "excluded sample" in done.stderr


def test_partial_rollout_trains_on_whole_groups_whose_tokens_say_which_weights_gave_them(slime_spec, graded, tmp_path):
    """Six groups are in progress and two of them end a step; six samples run at once, so that others are part done."""
    data = str(tmp_path / "rollout_{rollout_id}.pt")
    asked = (
        *SHARED[:-2],
        *graded,
        *("--over-sampling-batch-size", "6", "--partial-rollout", "--sglang-max-running-requests", "7"),
        *("--rollout-max-response-len", "48", "--save-debug-rollout-data", data, "--save-interval", "1"),
    )
    slime_spec("train", *asked, "--num-rollout", "3", "--output-dir", str(tmp_path / "first"))
    steps = ("--load", str(tmp_path / "first" / "checkpoints"), "--num-rollout", "5")
    slime_spec("train", *asked, *steps, "--output-dir", str(tmp_path / "second"))
    trained: list[int] = []
    num_mixed = 0
    for step in range(5):
        samples = load_rollout(data, step)
        ids = sorted({sample.prompt.prompt_id for sample in samples})
        assert [len(samples), len(ids)] == [4, 2]
        trained += ids
        for response in (sample.response for sample in samples):
            assert response.finish_reason in ("stop", "length")
            assert len(response.token_ids) == len(response.logprobs) <= 48
            assert all(version <= step for _, version in response.spans)
            num_mixed += len(response.version_spans) > 1
    assert len(set(trained)) == 10, "a prompt was trained on twice"
    assert max(trained) < 14, "the resumed run took new prompts before those that were unfinished"
    assert num_mixed > 0
