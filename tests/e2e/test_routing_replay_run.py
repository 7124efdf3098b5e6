"""Runs that replay the engine's experts: an engine in bfloat16 chooses others than a trainer in float32 would."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime_spec.metrics.jsonl import read_metrics
from tests.e2e.conftest import Run
from tests.e2e.test_mixed_families_run import make_policy
from tests.support.tiny_models import MIXED

DIFFERENCE, DISAGREEMENT = "train/train_rollout_logprob_abs_diff", "train/routing_disagreement"
JOB = (
    *("--rollout-batch-size", "6", "--n-samples-per-prompt", "8", "--rollout-max-response-len", "24", "--lr", "3e-3"),
    *("--sglang-dtype", "bfloat16", "trainer.metrics_of_all_samples=true"),
)
REPLAY = "--use-rollout-routing-replay"


QUICK, *LONG = MIXED
WHOLE_RUN = [pytest.mark.long, pytest.mark.proves("slime_spec", "rollout", "trainer_bridge", "conf")]


@pytest.mark.parametrize("architecture", [QUICK, *(pytest.param(name, marks=WHOLE_RUN) for name in LONG)])
def test_replay_takes_the_router_out_of_the_difference_between_engine_and_trainer(
    architecture: str, slime_spec: Run, graded: tuple[str, ...], tmp_path: Path
) -> None:
    policy = make_policy(tmp_path / "policy", architecture)
    saved = str(tmp_path / "step_{rollout_id}.pt")
    job = (*graded, *JOB, "--hf-checkpoint", str(policy))
    algorithm = "HISTORY" if architecture == "Qwen3MoeForCausalLM" else "NEXTN"
    drafts = ("--speculative-algorithm", algorithm, "--speculative-num-steps", "3")
    engines = ("--rollout-num-engines", "2", "--rollout-num-cpus-per-engine", "1")
    slime_spec(
        "train",
        *(*job, *drafts, *engines, REPLAY, "--num-rollout", "3", "--save-debug-rollout-data", saved),
        *("--partial-rollout", "--over-sampling-batch-size", "8", "--output-dir", str(tmp_path / "run")),
    )
    steps = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(0 < step[DISAGREEMENT] < 0.2 for step in steps)
    assert sum(step["spec/proposed_drafts"] or 0.0 for step in steps) > 0
    again = (*job, "--debug-train-only", "--load-debug-rollout-data", saved, "--num-rollout", "1")
    slime_spec("train", *again, REPLAY, "--output-dir", str(tmp_path / "replayed"))
    slime_spec("train", *again, "--output-dir", str(tmp_path / "routed"))
    (replayed,), (routed,) = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("replayed", "routed"))
    assert replayed[DIFFERENCE] == pytest.approx(steps[0][DIFFERENCE], rel=1e-6)
    assert replayed[DIFFERENCE] < 0.85 * routed[DIFFERENCE]
    assert DISAGREEMENT not in routed


def test_a_model_without_experts_and_samples_without_them_are_refused(
    slime_spec: Run, graded: tuple[str, ...], policy: Path, tmp_path: Path
) -> None:
    refused = slime_spec("train", *graded, REPLAY, "--dry-run", "--output-dir", str(tmp_path / "dry"), expect=2)
    assert "rollout.routing_replay" in refused.stdout + refused.stderr
    assert "LlamaForCausalLM has none" in refused.stdout + refused.stderr
    experts = make_policy(tmp_path / "policy", "Qwen3MoeForCausalLM")
    saved = str(tmp_path / "step_{rollout_id}.pt")
    job = (*graded, *JOB, "--hf-checkpoint", str(experts), "--num-rollout", "1")
    generates = ("--debug-rollout-only", "--save-debug-rollout-data", saved, "--output-dir", str(tmp_path / "rollout"))
    slime_spec("train", *job, *generates)
    without = ("--debug-train-only", "--load-debug-rollout-data", saved, "--output-dir", str(tmp_path / "run"))
    refused = slime_spec("train", *job, *without, REPLAY, expect=2)
    assert "must have the experts that its engine chose" in refused.stdout + refused.stderr
