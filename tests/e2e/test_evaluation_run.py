"""A run that is evaluated trains as one that is not, and ``slime-spec eval`` of what it leaves says the same again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from slime_spec.metrics.jsonl import read_metrics
from tests.e2e.conftest import ROOT, RUN_TIMEOUT_S

STEPS = 3
SETTINGS = (
    *("--speculative-algorithm", "LOOKUP", "--sp-min-token-match", "1", "--speculative-num-steps", "4"),
    *("--rollout-temperature", "0.3", "--rollout-max-response-len", "24", "--lr", "1e-3"),
    *("--num-rollout", str(STEPS), "--save-interval", "1", "--save-samples"),
)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> tuple[str, ...]:
    """Prompts that training does not have, and a task."""
    data = tmp_path_factory.mktemp("held_out") / "held.jsonl"
    data.write_text("".join(f'{{"question": "tell {i}", "label": "{i}"}}\n' for i in range(5)))
    return (
        *("--eval-interval", "2", "--eval-prompt-data", "held", f"{data}@[1:5]", "--eval-input-key", "question"),
        *("--n-samples-per-eval-prompt", "4", "--eval-max-response-len", "16", "--eval-temperature", "1"),
        *("--eval-task", "add10", "--eval-num-prompts", "3"),
    )


@pytest.fixture(scope="module")
def evaluated(slime_spec, graded, held_out, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    slime_spec("train", *SETTINGS, *graded, *held_out, "--output-dir", str(folder))
    return folder


@pytest.fixture(scope="module")
def plain(slime_spec, graded, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "run"
    slime_spec("train", *SETTINGS, *graded, "--output-dir", str(folder))
    return folder


def samples_of(folder: Path) -> list[tuple[object, ...]]:
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return [tuple(row[key] for key in ("rollout_id", "prompt_id", "sample", "reply", "reward")) for row in rows]


def test_training_draws_the_same_samples_and_counts_the_same_rounds_with_and_without_evaluation(evaluated, plain):
    assert samples_of(evaluated) == samples_of(plain)
    for with_eval, without in zip(
        read_metrics(evaluated / "metrics.jsonl"), read_metrics(plain / "metrics.jsonl"), strict=False
    ):
        for name in ("rollout/num_tokens", "rollout/reward_mean", "spec/verify_rounds", "spec/correct_drafts"):
            assert with_eval[name] == without[name]


def test_the_weights_before_every_second_step_and_at_the_end_are_evaluated(evaluated):
    rows = {row["step"]: row for row in read_metrics(evaluated / "metrics.jsonl")}
    assert {step: row.get("eval/held/weight_version") for step, row in rows.items()} == {0: 0, 1: None, 2: 2, 3: 3}
    for step in (0, 2, 3):
        assert rows[step]["eval/held/num_samples"] == 4 * 4
        assert rows[step]["eval/add10/num_samples"] == 3 * 4
        assert rows[step]["eval/held/response_len_max"] <= 16
        assert rows[step]["eval/held/spec_accept_length"] >= 1
        assert rows[step]["perf/eval_time"] > 0
    assert len({rows[step]["eval/held"] for step in (0, 2, 3)}) > 1, "the weights changed"
    files = {path.name for path in (evaluated / "eval").iterdir()}
    assert files == {"step_0.jsonl", "step_2.jsonl", "step_3.jsonl"}
    of_end = [json.loads(line) for line in (evaluated / "eval" / "step_3.jsonl").read_text().splitlines()]
    assert {name: rows[3][name] for name in of_end[0]["metrics"]} == of_end[0]["metrics"]
    assert [row["prompt"] for row in of_end if row.get("sample") == 0 and row["set"] == "held"] == [
        *("tell 1", "tell 2", "tell 3", "tell 4")
    ]
    assert "evaluated step=3 set=held reward=" in (evaluated / "run.log").read_text()


@pytest.mark.parametrize(("part", "step"), [("", 3), ("checkpoints/step-000002", 2)])
def test_what_the_run_leaves_evaluates_to_what_the_run_said(evaluated, tmp_path, part, step):
    """Its export as the engines load it, and a checkpoint as a trainer pushes it."""
    told = tmp_path / "told.json"
    command = [sys.executable, "-m", "slime_spec", "eval", str(evaluated / part), "--json", str(told)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    row = {row["step"]: row for row in read_metrics(evaluated / "metrics.jsonl")}[step]
    sets = json.loads(told.read_text())["sets"]
    for name in ("held", "add10"):
        assert sets[name]["reward"] == row[f"eval/{name}"]
        assert sets[name]["response_len_mean"] == row[f"eval/{name}/response_len_mean"]
        assert sets[name]["accuracy_high"] == row[f"eval/{name}/accuracy_high"]
    assert "Evaluation of" in done.stdout
    assert "held" in done.stdout
