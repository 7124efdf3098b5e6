"""Whole runs whose engine is the real SGLang: the Megatron trainer pushes to its server, and rollouts alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slime_spec.metrics.jsonl import read_metrics
from tests.support.sglang_checkpoints import make_draft, make_target
from tests.support.sglang_real import CPU, ROOT, START_TIMEOUT_S, sglang_python

pytestmark = [pytest.mark.long, pytest.mark.sglang_server]

STEPS = 2
RUN_TIMEOUT_S = 500


CHAIN = ("--speculative-num-steps", "3", "--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4")


SERVER = (
    *("--rollout-engine", "sglang", "--sglang-python", sglang_python(), "--sglang-attention-backend", "intel_amx"),
    *("--sglang-mem-fraction-static", "0.3", "--sglang-max-total-tokens", "4096", "--sglang-sleep-on-idle"),
    *("--sglang-max-running-requests", "8", "--sglang-start-timeout", str(START_TIMEOUT_S)),
)
EVALUATION = (
    *("--eval-interval", "1", "--eval-task", "add10", "--eval-num-prompts", "3"),
    *("--n-samples-per-eval-prompt", "2", "--eval-max-response-len", "12", "--eval-temperature", "0.5"),
)
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{CPU}{os.pathsep}{ROOT}",
    "SGLANG_USE_CPU_ENGINE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def _drafting(algorithm: str, policy: Path) -> tuple[str, ...]:
    draft = policy if algorithm == "STANDALONE" else make_draft(policy.parent / "draft", policy, algorithm)
    return ("--speculative-algorithm", algorithm, "--speculative-draft-model-path", str(draft), *CHAIN)


def run(folder: Path, *arguments: str, algorithm: str | None = "STANDALONE") -> list[dict[str, float]]:
    """``slime-spec train`` on a tiny policy whose draft is a copy of it, or random; the metrics of its steps."""
    policy = make_target(folder / "policy")
    data = folder / "prompts.jsonl"
    data.write_text("".join(f'{{"prompt": "say {i}", "label": "{i}"}}\n' for i in range(6)))
    command = [
        *(sys.executable, "-m", "slime_spec", "train", "--config", "tiny", "--hf-checkpoint", str(policy)),
        *SERVER,
        *(() if algorithm is None else _drafting(algorithm, policy)),
        *("--prompt-data", str(data), "--custom-rm-path", "tests.support.rewards:variety"),
        *("--rollout-max-response-len", "24", "--num-rollout", str(STEPS), "--output-dir", str(folder / "run")),
        "trainer.metrics_of_all_samples=true",  # where SGLang verifies greedily, all rewards of a group are equal
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, cwd=ROOT, env=ENVIRONMENT)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return read_metrics(folder / "run" / "metrics.jsonl")


@pytest.mark.parametrize(("speculates", "transport"), [(True, "collective"), (False, "object_store")])
def test_the_megatron_trainer_trains_on_what_sglang_samples_and_pushes_to_it(
    tmp_path: Path, speculates: bool, transport: str
) -> None:
    """On a CPU SGLang verifies greedily whatever the temperature: only without speculation do samples differ.

    The draft stays behind a policy that moves fast, and how much a canary of so few tokens falls for it is chance.
    """
    settings = ("--lr", "1e-3", "--push-transport", transport, "sglang_server.canary_drop=0.01", *EVALUATION)
    *metrics, end = run(tmp_path, *settings, algorithm="STANDALONE" if speculates else None)
    assert len(metrics) == STEPS
    for step, row in enumerate([*metrics, end]):
        assert row["eval/add10/num_samples"] == 6
        assert row["eval/add10/num_excluded"] == 0
        assert row["eval/add10/weight_version"] == step
        assert (row.get("eval/add10/spec_accept_length", 0) > 1) == speculates
    for step, row in enumerate(metrics):
        assert row["rollout/weight_version_min"] == row["rollout/weight_version_max"] == step
        assert row["sync/weight_version"] == step + 1
        assert row["sync/checksum_ok"] == 1
        assert (row["spec/verify_rounds"] > 0) == speculates
        assert row["train/train_rollout_logprob_abs_diff"] < 1e-4
        assert row.get("engine/speculating") == (1 if speculates else None)
        assert row["engine/restarts"] == row.get("engine/draft_resends", 0) == 0
        assert not speculates or row["sync/canary_accept_length"] > 1.0
    assert speculates or any(row["train/grad_norm"] > 0 for row in metrics)


@pytest.mark.parametrize("transport", ["collective", "object_store"])
def test_a_draft_that_learns_reaches_the_server_by_a_push_of_its_own(tmp_path: Path, transport: str) -> None:
    settings = ("--enable-draft-training", "--draft-lr", "1e-2", "--lr", "1e-3", "--push-transport", transport)
    metrics = run(tmp_path, *settings, "sglang_server.canary_prompts=0", algorithm="EAGLE3")
    assert len(metrics) == STEPS
    for step, row in enumerate(metrics):
        assert row["sync/draft_pushed"] == 1.0
        assert row["sync/weight_version"] == step + 1
        assert row["spec/draft_version_lag"] == 0.0
        assert row["train/draft_updates"] > 0
        assert row["engine/restarts"] == row["engine/draft_resends"] == 0
        assert row["spec/verify_rounds"] > 0
    assert (tmp_path / "run" / "draft" / "model.safetensors").is_file()


def test_rollouts_alone_are_a_run_too_also_through_a_router(tmp_path: Path) -> None:
    metrics = run(tmp_path, "--debug-rollout-only", "--sglang-router")
    assert len(metrics) == STEPS
    for row in metrics:
        assert row["rollout/num_samples"] > 0
    assert (tmp_path / "run" / "engines" / "router.log").is_file()
    for row in metrics:
        assert row["rollout/spec_accept_length"] > 1.0
