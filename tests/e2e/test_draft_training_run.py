"""A run that trains its draft, from the command line: learned, pushed, saved, resumed, exported, served again."""

from pathlib import Path

import pytest
import torch

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import load_draft
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.metrics.jsonl import read_metrics
from tests.support.sglang_checkpoints import make_draft


@pytest.fixture(scope="module")
def asked(policy: Path, graded: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    draft = make_draft(tmp_path_factory.mktemp("draft") / "draft", policy, "EAGLE3", draft_vocab_size=120)
    return (
        *graded,
        *("--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", str(draft)),
        *("--speculative-num-steps", "3", "--speculative-use-gumbel-coupling", "--rollout-max-response-len", "24"),
        *("--enable-draft-training", "--draft-lr", "1e-3", "--lr", "1e-3", "--rollout-num-engines", "2"),
    )


@pytest.fixture(scope="module")
def finished(slime_spec, asked: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    slime_spec("train", *asked, "--num-rollout", "4", "--save-interval", "2", "--output-dir", str(folder))
    return folder


def test_every_engine_drafts_with_the_draft_of_its_policy(finished: Path) -> None:
    rows = read_metrics(finished / "metrics.jsonl")
    assert len(rows) == 4
    for row in rows:
        assert row["sync/draft_pushed"] == 1.0
        assert row["spec/draft_version_lag"] == 0.0
        assert row["train/draft_updates"] > 0
        assert row["train/draft_skipped_updates"] == 0
        assert 1.0 <= row["train/draft_accept_length/rejection"] <= row["train/draft_accept_length/block"] <= 4.0
        assert row["perf/draft_train_time"] < row["perf/train_time"]


def drafts(folder: Path, policy: Path) -> dict[str, torch.Tensor]:
    return load_draft(folder, DraftSpec.from_folder(folder, ModelSpec.from_folder(policy))).tensors


def test_a_resumed_run_ends_with_the_draft_and_the_samples_of_one_that_was_not_interrupted(
    slime_spec, asked: tuple[str, ...], finished: Path, policy: Path, tmp_path: Path
) -> None:
    half = str(finished / "checkpoints" / "step-000002")
    slime_spec("train", *asked, "--num-rollout", "4", "--load", half, "--output-dir", str(tmp_path / "run"))
    ours, theirs = drafts(tmp_path / "run" / "draft", policy), drafts(finished / "draft", policy)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    resumed = read_metrics(tmp_path / "run" / "metrics.jsonl")
    whole = read_metrics(finished / "metrics.jsonl")[2:]
    for name in ("rollout/reward_mean", "rollout/spec_accept_length", "train/draft_loss"):
        assert [row[name] for row in resumed] == [row[name] for row in whole]


def test_the_exported_draft_serves_the_exported_policy(
    slime_spec, asked: tuple[str, ...], finished: Path, policy: Path, tmp_path: Path
) -> None:
    start = drafts(Path(asked[asked.index("--speculative-draft-model-path") + 1]), policy)
    assert not all(torch.equal(tensor, start[name]) for name, tensor in drafts(finished / "draft", policy).items())
    exported = ("--hf-checkpoint", str(finished / "hf"), "--speculative-draft-model-path", str(finished / "draft"))
    served = [argument for argument in asked[: asked.index("--enable-draft-training")]]
    slime_spec("rollout", *served, *exported, "--num-rollout", "1", "--output-dir", str(tmp_path / "run"))
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert row["rollout/spec_accept_length"] > 1.0
