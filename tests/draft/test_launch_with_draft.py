"""A launch refuses a damaged draft before anything starts."""

from pathlib import Path

import pytest
import torch

from slime_spec.errors import CheckpointError
from slime_spec.launch.compose import composed
from slime_spec.launch.preflight import Inputs, look
from slime_spec.rl.rollout_data import save_rollout
from tests.support.tiny_drafts import BLOCK, EAGLE3, NEXTN, edit_tensors, make_tiny_draft
from tests.support.tiny_policy import make_tiny_policy

VOCAB = {"vocab_size": 257}


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return make_tiny_policy(tmp_path / "policy", max_position_embeddings=BLOCK["max_position_embeddings"])


def launched(policy: Path, draft: Path, algorithm: str, *flags: str) -> Inputs:
    drafting = ["--speculative-algorithm", algorithm, "--speculative-draft-model-path", str(draft)]
    lengths = ["--rollout-max-prompt-len", "400", "--rollout-max-response-len", "32"]
    return look(composed(["--config", "tiny", "--hf-checkpoint", str(policy), *lengths, *drafting, *flags])).checked()


@pytest.mark.parametrize(
    ("algorithm", "config", "tensor"),
    [
        ("EAGLE3", EAGLE3 | VOCAB, "midlayer.mlp.up_proj.weight"),
        ("NEXTN", NEXTN | VOCAB, "model.mtp_layers.0.input_proj.weight"),
    ],
)
def test_a_draft_network_with_a_damaged_tensor_is_refused_by_its_name(
    tmp_path: Path, policy: Path, algorithm: str, config: dict[str, object], tensor: str
) -> None:
    draft = make_tiny_draft(tmp_path / "draft", policy, config)
    assert launched(policy, draft, algorithm).spec is not None
    edit_tensors(draft, **{tensor.replace(".", "__"): None})
    with pytest.raises(CheckpointError, match=f"{tensor}: must be in the draft's checkpoint"):
        launched(policy, draft, algorithm)


def test_a_whole_draft_model_with_a_damaged_tensor_is_refused_by_its_name(tmp_path: Path, policy: Path) -> None:
    draft = make_tiny_policy(tmp_path / "draft", max_position_embeddings=BLOCK["max_position_embeddings"])
    assert launched(policy, draft, "STANDALONE").spec is not None
    edit_tensors(draft, model__norm__weight=torch.full((48,), float("nan")))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: must be finite"):
        launched(policy, draft, "STANDALONE")
    (draft / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"speculative\.draft_model_path: must hold"):
        launched(policy, draft, "STANDALONE")


def test_a_run_that_only_trains_needs_no_draft(tmp_path: Path, policy: Path) -> None:
    draft = make_tiny_draft(tmp_path / "draft", policy, EAGLE3 | VOCAB)
    (draft / "model.safetensors").unlink()
    save_rollout(str(tmp_path / "0.pt"), 0, [])
    flags = ("--debug-train-only", "--load-debug-rollout-data", str(tmp_path / "{rollout_id}.pt"), "--num-rollout", "1")
    assert launched(policy, draft, "EAGLE3", *flags).spec is not None
