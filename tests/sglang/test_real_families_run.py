"""Whole runs of models with experts on the real SGLang: policy and draft learn, and both are pushed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slime_spec.metrics.jsonl import read_metrics
from tests.sglang.test_real_families import make_model
from tests.sglang.test_real_sglang_run import CHAIN, ENVIRONMENT, SERVER
from tests.support.sglang_real import ROOT
from tests.support.tiny_drafts import EAGLE3, make_tiny_draft

pytestmark = [
    pytest.mark.long,
    pytest.mark.sglang_server,
    pytest.mark.proves("slime_spec", "rollout", "trainer_bridge", "conf"),
]

LEARNING_STEPS, STEPS = 30, 3
OF_A_RANDOM_LAYER = 1.09  # tokens a round, at most, as measured
RUN_TIMEOUT_S = 600


def train(policy: Path, folder: Path, num_steps: int, *arguments: str) -> list[dict[str, Any]]:
    """The metrics of a run's steps, in which the draft learns, too."""
    data = policy.parent / "prompts.jsonl"
    data.write_text("".join(f'{{"prompt": "say {i}", "label": "{i}"}}\n' for i in range(6)))
    command = [
        *(sys.executable, "-m", "slime_spec", "train", "--config", "tiny", "--hf-checkpoint", str(policy)),
        *("--prompt-data", str(data), "--custom-rm-path", "tests.support.rewards:variety"),
        *("--rollout-max-response-len", "24", "--num-rollout", str(num_steps), "--output-dir", str(folder)),
        *("--enable-draft-training", "trainer.metrics_of_all_samples=true"),
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, cwd=ROOT, env=ENVIRONMENT)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return read_metrics(folder / "metrics.jsonl")


@pytest.mark.parametrize("architecture", ["Glm4MoeForCausalLM", "DeepseekV3ForCausalLM"])
def test_a_family_trains_on_what_its_server_samples_and_its_layer_is_accepted_after_every_push(
    architecture: str, tmp_path: Path
) -> None:
    """First the embedded engine's run teaches the layer what to draft: of a random layer no canary says anything.

    On a CPU SGLang verifies greedily, all replies of a group are the same, and nothing but the KL loss trains. So the
    layer is taught near the greedy replies.
    """
    train(
        make_model(tmp_path, architecture),
        tmp_path / "first",
        LEARNING_STEPS,
        *("--speculative-algorithm", "NEXTN"),
        *("--rollout-batch-size", "6", "--n-samples-per-prompt", "8", "--rollout-temperature", "0.2", "--lr", "1e-4"),
        *("--draft-lr", "3e-3", "--draft-loss", "soft_ce", "--draft-optimizer-steps", "8"),
        *("--speculative-num-steps", "3"),
    )
    metrics = train(
        tmp_path / "first" / "hf",
        tmp_path / "second",
        STEPS,
        *("--speculative-algorithm", "NEXTN", *SERVER, *CHAIN),
        *("--lr", "1e-4", "--draft-lr", "1e-4", "--kl-loss-coef", "0.1"),
    )
    assert_pushed(metrics)
    assert all(row["sync/canary_accept_length"] > OF_A_RANDOM_LAYER for row in metrics)


def test_qwen3_with_experts_trains_on_what_its_server_samples_with_an_eagle3_draft_that_learns(tmp_path: Path) -> None:
    policy = make_model(tmp_path, "Qwen3MoeForCausalLM")
    draft = make_tiny_draft(tmp_path / "draft", policy, {**EAGLE3, "vocab_size": 257, "model_type": "llama"})
    drafting = ("--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", str(draft), *CHAIN)
    metrics = train(
        policy,
        tmp_path / "run",
        STEPS,
        *(*drafting, *SERVER, "--lr", "1e-3", "--draft-lr", "1e-3", "--kl-loss-coef", "0.1"),
        "sglang_server.canary_prompts=0",  # of a random draft a canary says nothing
    )
    assert_pushed(metrics)
    assert (tmp_path / "run" / "draft" / "model.safetensors").is_file()


def assert_pushed(metrics: list[dict[str, Any]]) -> None:
    """Each step trained policy and draft on the policy's own samples, and the server has both."""
    assert len(metrics) == STEPS
    for step, row in enumerate(metrics):
        assert row["sync/weight_version"] == step + 1
        assert row.get("sync/checksum_ok") == (1 if step else None)  # by what the second push moves
        assert row["sync/draft_pushed"] == 1
        assert row["train/train_rollout_logprob_abs_diff"] < 1e-4
        assert row["train/draft_updates"] > 0
        assert row["spec/draft_version_lag"] == 0
        assert row["engine/speculating"] == 1
        assert row["engine/restarts"] == row["engine/draft_resends"] == 0
