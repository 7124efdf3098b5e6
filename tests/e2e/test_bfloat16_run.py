"""The main job in bfloat16 on a tiny policy, from the command line."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from slime_spec.metrics.jsonl import read_metrics
from tests.e2e.conftest import Run

SMALL = (
    *("--num-rollout", "2", "--rollout-batch-size", "2", "--n-samples-per-prompt", "2"),
    *("--rollout-max-response-len", "12", "--rollout-num-cpus-per-engine", "1", "trainer.num_cpus_per_rank=1"),
)


def test_the_engine_follows_a_trainer_in_bfloat16_and_their_logprobs_are_a_rounding_apart(
    slime_spec: Run, graded: tuple[str, ...], policy: Path, tmp_path: Path
) -> None:
    job = ("--config", "smollm2-135m-bf16", "task.names=[]", "speculative=none", "--lr", "1e-3")
    every = "trainer.metrics_of_all_samples=true"
    slime_spec("train", *job, *graded, *SMALL, every, "--output-dir", str(tmp_path / "run"))
    steps = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [step["sync/weight_version"] for step in steps] == [1, 2]
    assert all(step["sync/checksum_ok"] == 1 for step in steps)
    # float32 stays below 1e-4, and 0 would say that nothing was compared.
    assert all(0 < step["train/train_rollout_logprob_abs_diff"] < 0.05 for step in steps)
    before, after = load_file(policy / "model.safetensors"), load_file(tmp_path / "run" / "hf" / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert any(not torch.equal(before[name].bfloat16(), tensor) for name, tensor in after.items())
