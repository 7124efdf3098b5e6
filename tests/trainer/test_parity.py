"""Three policy steps in every layout against Hugging Face, AdamW and a loss written as a loop."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slime_spec.config.tree import Config
from slime_spec.types import TrainReport, TrainSample
from tests.support.tiny_models import load_reference
from tests.trainer.trainer_support import make_policy, run_ranks, tiny_config, tiny_samples

NUM_STEPS = 3


def hf_logprobs(model: torch.nn.Module, sample: TrainSample) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs and entropy at one sample's response tokens; one plain forward, nothing packed."""
    logits = model(torch.tensor([sample.token_ids])).logits[0, sample.prompt_len - 1 : -1]
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    targets = torch.tensor(sample.token_ids[sample.prompt_len :])
    return log_probs.gather(-1, targets[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(dim=-1)


def near_policy(folder: Path, samples: list[TrainSample]) -> list[TrainSample]:
    """The samples with the model's own logprobs, disturbed, so that some ratios are clipped and some are not."""
    model = load_reference(folder)
    generator = torch.Generator().manual_seed(5)
    near = []
    with torch.no_grad():
        for sample in samples:
            logprobs, _ = hf_logprobs(model, sample)
            noise = torch.randn(logprobs.shape, generator=generator) * 0.3
            near.append(replace(sample, rollout_logprobs=tuple((logprobs + noise).tolist())))
    return near


def reference_steps(
    config: Config, batches: list[list[TrainSample]]
) -> tuple[list[TrainReport], dict[str, torch.Tensor]]:
    """The same training, token by token, as the papers write it."""
    folder = Path(config.model.hf_checkpoint)
    model, reference = load_reference(folder), load_reference(folder)
    trainer, algorithm = config.trainer, config.algorithm
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=trainer.lr, betas=(trainer.adam_beta1, trainer.adam_beta2), weight_decay=0.0
    )
    reports = []
    for batch in batches:
        size = trainer.global_batch_size or len(batch)
        parts = [batch[start : start + size] for start in range(0, len(batch), size)]
        sums, norms, count = dict.fromkeys(("loss", "pg", "entropy", "clip", "kl", "diff"), 0.0), [], 0
        for part in parts:
            num_tokens = sum(len(s.rollout_logprobs) for s in part)
            optimizer.zero_grad()
            total = torch.zeros(())
            for sample in part:
                logprobs, entropy = hf_logprobs(model, sample)
                with torch.no_grad():
                    ref_logprobs, _ = hf_logprobs(reference, sample)
                for t, old in enumerate(sample.rollout_logprobs):
                    ratio = (logprobs[t] - old).exp()
                    held = ratio.clamp(1 - algorithm.eps_clip, 1 + algorithm.eps_clip)
                    pg = -torch.minimum(ratio * sample.advantage, held * sample.advantage)
                    log_ratio = ref_logprobs[t] - logprobs[t]
                    kl = log_ratio.exp() - log_ratio - 1 if algorithm.kl_loss_coef else torch.zeros(())
                    total = total + pg + algorithm.kl_loss_coef * kl
                    sums["pg"] += pg.item()
                    sums["kl"] += kl.item()
                    sums["clip"] += float(held * sample.advantage < ratio * sample.advantage)
                    sums["diff"] += abs(logprobs[t].item() - old)
                sums["entropy"] += entropy.sum().item()
            sums["loss"] += total.item()
            (total / num_tokens).backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.clip_grad)))
            optimizer.step()
            count += num_tokens
        mean = {key: value / count for key, value in sums.items()}
        norm = sum(norms) / len(norms)
        reports.append(
            TrainReport(
                mean["loss"], mean["pg"], norm, mean["entropy"], mean["clip"], mean["kl"], mean["diff"],
                count, len(parts), 0,
            )
        )  # fmt: skip
    return reports, {name: tensor for name, tensor in model.state_dict().items()}


CASES = {
    "1x1": ("LlamaForCausalLM", True, {}, {}),
    "1x1 with recomputed activations and several optimizer steps": (
        "Qwen3ForCausalLM",
        True,
        {"recompute": True, "global_batch_size": 5},
        {},
    ),
    "TP2": ("Qwen3ForCausalLM", False, {"world_size": 2, "tensor_model_parallel_size": 2}, {}),
    "TP2 with the reference's KL": (
        "Qwen2ForCausalLM",
        True,
        {"world_size": 2, "tensor_model_parallel_size": 2},
        {"kl_loss_coef": 0.1},
    ),
    "PP2": ("LlamaForCausalLM", True, {"world_size": 2, "pipeline_model_parallel_size": 2}, {"kl_loss_coef": 0.1}),
    "DP2": ("Qwen2ForCausalLM", False, {"world_size": 2}, {}),
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
