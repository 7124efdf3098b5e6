"""The reference trainer computes GRPO as the papers write it, with Hugging Face and AdamW: unpacked, not parallel.

Tests and the benchmark compare the Megatron trainer with it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from slime_spec.config.tree import AlgorithmConfig, Config
from slime_spec.types import TrainReport, TrainSample


def tiny_samples(seed: int = 0, num_prompts: int = 3, group_size: int = 4, vocab_size: int = 160) -> list[TrainSample]:
    """Make groups that share prompts, with responses of 1 to 12 tokens and logprobs near a random model's."""
    rng = random.Random(seed)
    samples = []
    for _ in range(num_prompts):
        prompt = tuple(rng.randrange(vocab_size) for _ in range(rng.randint(3, 20)))
        for _ in range(group_size):
            response = tuple(rng.randrange(vocab_size) for _ in range(rng.randint(1, 12)))
            logprobs = tuple(rng.uniform(-8.0, -3.0) for _ in response)
            samples.append(TrainSample(prompt + response, len(prompt), logprobs, rng.gauss(0.0, 1.0)))
    return samples


def near_policy(folder: Path, samples: Sequence[TrainSample]) -> list[TrainSample]:
    """Return the samples with the model's own logprobs plus noise, so that only some ratios are clipped."""
    model = _loaded(folder)
    generator = torch.Generator().manual_seed(5)
    near = []
    with torch.no_grad():
        for sample in samples:
            logprobs, _ = hf_logprobs(model, sample)
            noise = torch.randn(logprobs.shape, generator=generator) * 0.3
            near.append(replace(sample, rollout_logprobs=tuple((logprobs + noise).tolist())))
    return near


def hf_logprobs(model: torch.nn.Module, sample: TrainSample) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logprobs and entropy at one sample's response tokens, from one plain forward."""
    logits = model(torch.tensor([sample.token_ids])).logits[0, sample.prompt_len - 1 : -1]
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    targets = torch.tensor(sample.token_ids[sample.prompt_len :])
    return log_probs.gather(-1, targets[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(dim=-1)


@dataclass
class _Sums:
    """Holds the sums that a report averages over tokens."""

    num_tokens: int = 0
    loss: float = 0.0
    pg: float = 0.0
    entropy: float = 0.0
    clipped: float = 0.0
    kl: float = 0.0
    diff: float = 0.0


def reference_steps(
    config: Config, batches: Sequence[Sequence[TrainSample]]
) -> tuple[list[TrainReport], dict[str, torch.Tensor]]:
    """Return a report per batch and the final weights, under Hugging Face names (num_microbatches is 0)."""
    folder, trainer = Path(config.model.hf_checkpoint), config.trainer
    model, reference = _loaded(folder), _loaded(folder)
    groups = [
        {"params": [each for each in model.parameters() if each.dim() > 1], "weight_decay": trainer.weight_decay},
        {"params": [each for each in model.parameters() if each.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=trainer.lr, betas=(trainer.adam_beta1, trainer.adam_beta2), eps=trainer.adam_eps
    )
    reports = []
    for batch in batches:
        size = trainer.global_batch_size or len(batch)
        sums, norms = _Sums(), []
        for start in range(0, len(batch), size):
            part = batch[start : start + size]
            num_tokens = sum(sample.num_loss_tokens for sample in part)
            optimizer.zero_grad()
            total = torch.zeros(())
            for sample in part:
                total = total + _sample_loss(model, reference, sample, config.algorithm, sums)
            (total / num_tokens).backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.clip_grad)))
            optimizer.step()
            sums.loss += total.item()
            sums.num_tokens += num_tokens
        reports.append(_report(sums, norms))
    return reports, dict(model.state_dict())


def _sample_loss(
    model: torch.nn.Module,
    reference: torch.nn.Module,
    sample: TrainSample,
    algorithm: AlgorithmConfig,
    sums: _Sums,
) -> torch.Tensor:
    """Return the sum of one sample's token losses; add the report's sums to ``sums``."""
    logprobs, entropy = hf_logprobs(model, sample)
    with torch.no_grad():
        ref_logprobs, _ = hf_logprobs(reference, sample)
    total = torch.zeros(())
    for t, (old, advantage) in enumerate(zip(sample.rollout_logprobs, sample.advantages, strict=True)):
        if sample.loss_mask and not sample.loss_mask[t]:
            continue
        ratio = (logprobs[t] - old).exp()
        held = ratio.clamp(1 - algorithm.eps_clip, 1 + algorithm.eps_clip)
        pg = -torch.minimum(ratio * advantage, held * advantage)
        log_ratio = ref_logprobs[t] - logprobs[t]
        kl = log_ratio.exp() - log_ratio - 1 if algorithm.kl_loss_coef else torch.zeros(())
        total = total + pg + algorithm.kl_loss_coef * kl
        sums.pg += pg.item()
        sums.kl += kl.item()
        sums.clipped += float(held * advantage < ratio * advantage)
        sums.diff += abs(logprobs[t].item() - old)
        sums.entropy += entropy[t].item()
    return total


def _report(sums: _Sums, grad_norms: list[float]) -> TrainReport:
    return TrainReport(
        loss=sums.loss / sums.num_tokens,
        pg_loss=sums.pg / sums.num_tokens,
        grad_norm=sum(grad_norms) / len(grad_norms),
        entropy=sums.entropy / sums.num_tokens,
        clip_fraction=sums.clipped / sums.num_tokens,
        kl=sums.kl / sums.num_tokens,
        train_rollout_logprob_abs_diff=sums.diff / sums.num_tokens,
        num_tokens=sums.num_tokens,
        num_trained_tokens=sums.num_tokens,
        num_optimizer_steps=len(grad_norms),
        num_microbatches=0,
    )


def _loaded(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    return model.eval()
