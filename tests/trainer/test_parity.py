"""Three policy steps in every layout against the reference: Hugging Face, AdamW and a loss written as a loop."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slime_spec.bench.reference_trainer import near_policy, reference_steps, tiny_samples
from slime_spec.types import TrainReport
from tests.trainer.trainer_support import make_policy, run_ranks, tiny_config

NUM_STEPS = 3


CASES = {
    "1x1": ("LlamaForCausalLM", True, {}, {}),
    "1x1 with recomputed activations and several optimizer steps": (
        "Qwen3ForCausalLM",
        True,
        {"recompute": True, "global_batch_size": 5},
        {},
    ),
    # Case audit/20: Megatron's wd_mult, by which norms and biases do not decay.
    "1x1 with weight decay": ("Qwen2ForCausalLM", True, {"weight_decay": 0.5}, {}),
    "TP2": ("Qwen3ForCausalLM", False, {"world_size": 2, "tensor_model_parallel_size": 2}, {}),
    "TP2 with the reference's KL": (
        "Qwen2ForCausalLM",
        True,
        {"world_size": 2, "tensor_model_parallel_size": 2},
        {"kl_loss_coef": 0.1},
    ),
    "PP2": ("LlamaForCausalLM", True, {"world_size": 2, "pipeline_model_parallel_size": 2}, {"kl_loss_coef": 0.1}),
    "DP2": ("Qwen2ForCausalLM", False, {"world_size": 2}, {}),
    "DP2 with the distributed optimizer": (
        "LlamaForCausalLM",
        True,
        {"world_size": 2, "use_distributed_optimizer": True, "weight_decay": 0.5},
        {"kl_loss_coef": 0.1},
    ),
    "DP2 with the distributed optimizer and AdamW on the host": (
        "LlamaForCausalLM",
        False,
        {"world_size": 2, "use_distributed_optimizer": True, "optimizer_cpu_offload": True, "weight_decay": 0.5},
        {},
    ),
    "1x1 with AdamW on the host": ("Qwen2ForCausalLM", True, {"optimizer_cpu_offload": True, "weight_decay": 0.5}, {}),
}


@dataclass(frozen=True)
class Trained:
    """One layout's run beside its reference."""

    folder: Path
    tied: bool
    before: dict[str, torch.Tensor]
    reports: list[list[TrainReport]]
    after: dict[str, torch.Tensor]
    expected_reports: list[TrainReport]
    expected_weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=CASES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    architecture, tied, trainer, algorithm = CASES[request.param]
    folder = make_policy(tmp_path_factory.mktemp("policy"), architecture, tied)
    config = tiny_config(folder, trainer, algorithm)
    batches = [near_policy(folder, tiny_samples(seed)) for seed in range(NUM_STEPS)]
    answers = run_ranks(config.trainer.world_size, "train", config, batches)
    before = {name: tensor for part, _, _ in answers for name, tensor in part.items()}
    after = {name: tensor for _, _, part in answers for name, tensor in part.items()}
    reports = [reports for _, reports, _ in answers]
    return Trained(folder, tied, before, reports, after, *reference_steps(config, batches))


def test_weights_read_back_from_megatron_are_the_checkpoints_bit_for_bit(trained: Trained) -> None:
    saved = load_file(trained.folder / "model.safetensors")
    assert trained.before.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(trained.before[name], tensor), name


def test_three_steps_report_what_hugging_face_with_adamw_does(trained: Trained) -> None:
    for reports in trained.reports:
        for got, expected in zip(reports, trained.expected_reports, strict=True):
            assert got.loss == pytest.approx(expected.loss, abs=1e-4)
            assert got.pg_loss == pytest.approx(expected.pg_loss, abs=1e-4)
            assert got.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3)
            assert got.entropy == pytest.approx(expected.entropy, abs=1e-4)
            assert got.kl == pytest.approx(expected.kl, abs=1e-4)
            assert got.clip_fraction == expected.clip_fraction
            assert 0.0 < got.clip_fraction < 1.0
            diff = got.train_rollout_logprob_abs_diff
            assert diff == pytest.approx(expected.train_rollout_logprob_abs_diff, abs=1e-4)
            assert got.num_tokens == expected.num_tokens
            assert got.num_optimizer_steps == expected.num_optimizer_steps


def test_three_steps_leave_the_weights_of_hugging_face_with_adamw(trained: Trained) -> None:
    assert trained.after.keys() == trained.expected_weights.keys() - ({"lm_head.weight"} if trained.tied else set())
    for name, tensor in trained.after.items():
        torch.testing.assert_close(tensor, trained.expected_weights[name], atol=1e-3, rtol=0.0)
        moved = (tensor - trained.before[name]).abs().max().item()
        assert moved > 5e-3, f"{name} hardly moved, so its agreement would mean little"
