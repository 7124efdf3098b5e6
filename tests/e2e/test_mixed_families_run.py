"""Whole runs of models with experts and latent attention: Megatron trains, the embedded engine serves each push."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest
from safetensors.torch import load_file

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import draft_shapes
from slime_spec.checkpoints.families.experts import CORRECTION
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import expected_shapes
from slime_spec.metrics.jsonl import read_metrics
from tests.e2e.conftest import Run
from tests.support.fp8_checkpoints import store_in_fp8, store_numbers
from tests.support.tiny_models import MIXED, add_mtp_layer, make_tiny_checkpoint
from tests.support.tiny_policy import make_tiny_policy

STEPS = 15
QWEN3_MOE = "Qwen3MoeForCausalLM"


def make_policy(folder: Path, architecture: str) -> Path:
    make_tiny_policy(folder)  # for its tokenizer
    eos = json.loads((folder / "config.json").read_text())["eos_token_id"]
    make_tiny_checkpoint(folder, architecture, vocab_size=257, eos_token_id=eos)
    return folder if architecture == QWEN3_MOE else add_mtp_layer(folder)


QUICK, *LONG = MIXED
WHOLE_RUN = pytest.mark.proves("slime_spec", "rollout", "trainer_bridge", "conf")


@pytest.mark.parametrize("architecture", [QUICK, *(pytest.param(name, marks=WHOLE_RUN) for name in LONG)])
def test_a_family_learns_while_it_speculates(
    architecture: str, slime_spec: Run, graded: tuple[str, ...], tmp_path: Path
) -> None:
    policy, folder = make_policy(tmp_path / "policy", architecture), tmp_path / "run"
    slime_spec(
        "train",
        *graded,
        *("--hf-checkpoint", str(policy), "--output-dir", str(folder), "--num-rollout", str(STEPS), "--lr", "3e-3"),
        *("--rollout-batch-size", "4", "--n-samples-per-prompt", "4", "--rollout-max-response-len", "16"),
        *("--speculative-algorithm", "HISTORY" if architecture == QWEN3_MOE else "NEXTN"),
        *("--speculative-num-steps", "3", "trainer.metrics_of_all_samples=true"),
        *(() if architecture == QWEN3_MOE else ("--enable-mtp-training", "--draft-lr", "3e-3")),
        # With MTP training in one family, so that what a draft learns of is a pass with replayed experts, too.
        *(("--use-rollout-routing-replay",) if architecture == "DeepseekV3ForCausalLM" else ()),
    )
    rows = read_metrics(folder / "metrics.jsonl")
    rewards = [row["rollout/reward_mean"] or 0.0 for row in rows]
    assert mean(rewards[-5:]) > mean(rewards[:5]) + 0.2
    assert all((row["train/train_rollout_logprob_abs_diff"] or 1.0) < 1e-4 for row in rows)
    assert [row["sync/weight_version"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["sync/checksum_ok"] == 1 for row in rows)
    assert sum(row["spec/proposed_drafts"] or 0.0 for row in rows) > 0
    if architecture != QWEN3_MOE:
        assert sum(row["spec/correct_drafts"] or 0.0 for row in rows) > 0
        accepted = [row["train/draft_accept_pos_1"] or 0.0 for row in rows]
        assert mean(accepted[-3:]) > mean(accepted[:3]) + 0.05
        assert [row["spec/draft_version_lag"] for row in rows] == [0.0] * STEPS
    check_export(policy, folder / "hf")


@WHOLE_RUN
def test_a_policy_in_fp8_learns_from_its_numbers_and_is_exported_as_numbers(
    slime_spec: Run, graded: tuple[str, ...], tmp_path: Path
) -> None:
    """DeepSeek-R1's format: the embedded engine serves it and its MTP layer, and takes pushes of numbers."""
    policy, folder = store_in_fp8(make_policy(tmp_path / "policy", "DeepseekV3ForCausalLM")), tmp_path / "run"
    steps = 3
    slime_spec(
        "train",
        *graded,
        *("--hf-checkpoint", str(policy), "--output-dir", str(folder), "--num-rollout", str(steps), "--lr", "3e-3"),
        *("--rollout-batch-size", "4", "--n-samples-per-prompt", "4", "--rollout-max-response-len", "16"),
        *("--speculative-algorithm", "NEXTN", "--speculative-num-steps", "3", "trainer.metrics_of_all_samples=true"),
        *("--enable-mtp-training", "--draft-lr", "3e-3"),
    )
    rows = read_metrics(folder / "metrics.jsonl")
    assert all((row["train/train_rollout_logprob_abs_diff"] or 1.0) < 1e-4 for row in rows)
    assert [row["sync/weight_version"] for row in rows] == list(range(1, steps + 1))
    assert all(row["sync/checksum_ok"] == 1 for row in rows)
    assert sum(row["spec/correct_drafts"] or 0.0 for row in rows) > 0
    check_export(store_numbers(policy, tmp_path / "numbers"), folder / "hf")
    assert "quantization_config" not in json.loads((folder / "hf" / "config.json").read_text())


def check_export(policy: Path, exported: Path) -> None:
    """Every tensor comes back: those that are trained changed, corrections as they were, copies as what they copy."""
    before, after = load_file(policy / "model.safetensors"), load_file(exported / "model.safetensors")
    assert {name: each.shape for name, each in before.items()} == {name: each.shape for name, each in after.items()}
    spec = ModelSpec.from_folder(policy)
    trained = set(expected_shapes(spec))
    if spec.experts is not None and spec.experts.has_correction:
        draft = DraftSpec.from_folder(policy, spec)
        trained |= draft_shapes(draft).keys()
        layer = draft.mtp_layer
        copies = {layer.prefix + name: original for name, original in layer.copies.items()}
        assert copies.keys() <= after.keys()
        assert all(after[name].equal(after[original]) for name, original in copies.items())
        assert after.keys() == trained | copies.keys()
    for name in trained:
        assert before[name].equal(after[name]) == name.endswith(CORRECTION), name
