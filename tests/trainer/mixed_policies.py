"""Tiny policies with experts, latent attention or partial rotation, their layouts, and what transformers computes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from slime_spec.bench.reference_trainer import hf_logprobs, near_policy, tiny_samples
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import expected_shapes
from slime_spec.types import TrainSample
from tests.support.forced_experts import Routing
from tests.support.tiny_models import MIXED, load_reference
from tests.trainer.trainer_support import make_policy, run_ranks, tiny_config

BIAS = "e_score_correction_bias"
TP2: Mapping[str, Any] = {"world_size": 2, "tensor_model_parallel_size": 2}
TP2_EP2: Mapping[str, Any] = {**TP2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
DP2_EP2: Mapping[str, Any] = {"world_size": 2, "expert_model_parallel_size": 2}
SPLIT: Mapping[str, Any] = {**DP2_EP2, "use_distributed_optimizer": True}
UNEVEN: Mapping[str, Any] = {
    "world_size": 2,
    "pipeline_model_parallel_size": 2,
    "num_layers_in_last_pipeline_stage": 1,
}
LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    "one rank": {},
    "TP2 EP2": TP2_EP2,
    "TP2 EP2 with recomputed activations": {**TP2_EP2, "recompute": True},
    "TP2 ETP2": TP2,
    "PP2": {"world_size": 2, "pipeline_model_parallel_size": 2},
    "PP2 of three layers and one": UNEVEN,
    "DP2": {"world_size": 2},
    "DP2 EP2": DP2_EP2,
    "DP2 EP2 with the distributed optimizer": SPLIT,
    "TP2 PP2 EP2": {**TP2_EP2, "world_size": 4, "pipeline_model_parallel_size": 2},
}


@dataclass(frozen=True)
class Reference:
    """What transformers and autograd make of one step's samples, under the checkpoint's names."""

    folder: Path
    samples: Sequence[TrainSample]
    logits: Sequence[torch.Tensor]
    gradients: Mapping[str, torch.Tensor]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "model.safetensors")


def mixed_policy(folder: Path, architecture: str, **overrides: Any) -> Path:
    """A tiny checkpoint whose sizes two ranks of every kind can share."""
    kv_heads = 4 if "kv_lora_rank" in MIXED[architecture] else 2
    return make_policy(folder, architecture, tied=False, num_key_value_heads=kv_heads, **overrides)


def reference_pass(folder: Path, samples: Sequence[TrainSample] = ()) -> Reference:
    """A pass over the samples, whose routed experts are forced upon the model where they have any."""
    samples = samples or near_policy(folder, tiny_samples(seed=3))
    model = load_reference(folder)
    if any(sample.routed_experts for sample in samples):
        with Routing(model, ModelSpec.from_folder(folder)).watched() as routing:
            return _pass(folder, model, samples, routing)
    return _pass(folder, model, samples, None)


def _pass(folder: Path, model: PreTrainedModel, samples: Sequence[TrainSample], routing: Routing | None) -> Reference:
    logits, total, num_tokens = [], torch.zeros(()), 0
    for sample in samples:
        if routing is not None:
            routing.forced = None if sample.routed_experts is None else sample.routed_experts.ids
        with torch.no_grad():
            logits.append(model(torch.tensor([sample.token_ids])).logits[0, sample.prompt_len - 1 : -1])
        logprobs, _ = hf_logprobs(model, sample)
        ratio = (logprobs - torch.tensor(sample.rollout_logprobs)).exp()
        held = ratio.clamp(0.8, 1.2)
        total = total - torch.minimum(ratio * sample.advantage, held * sample.advantage).sum()
        num_tokens += len(sample.rollout_logprobs)
    (total / num_tokens).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Reference(folder, samples, logits, by_expert(gradients))


def by_expert(stacked: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Name each expert's tensors, which transformers has stacked, as checkpoints do."""
    named = {}
    for name, tensor in stacked.items():
        prefix, _, part = name.rpartition(".")
        if not prefix.endswith("mlp.experts"):
            named[name] = tensor
            continue
        parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
        for expert, of_expert in enumerate(tensor):
            for own, rows in zip(parts, of_expert.chunk(len(parts)), strict=True):
                named[f"{prefix}.{expert}.{own}.weight"] = rows
    return named


@dataclass(frozen=True)
class Pass:
    """What the ranks of a layout have made of one step's samples, each entry of every rank that has one."""

    weights: Sequence[dict[str, torch.Tensor]]
    logits: dict[int, torch.Tensor]
    gradients: Sequence[dict[str, torch.Tensor]]
    bias_dtypes: set[str]


def passed(reference: Reference, trainer: dict[str, object]) -> Pass:
    config = tiny_config(reference.folder, trainer)
    replays = any(sample.routed_experts for sample in reference.samples)
    config = replace(config, rollout=replace(config.rollout, routing_replay=replays))
    answers = run_ranks(config.trainer.world_size, "mixed_pass", config, reference.samples)
    weights, logits, gradients, dtypes = zip(*answers, strict=True)
    whole = {index: each for of_rank in logits for index, each in of_rank.items()}
    return Pass(weights, whole, gradients, {dtype for each in dtypes for dtype in each.split()})


def assert_is_transformers(got: Pass, reference: Reference) -> None:
    """Weights come back bit for bit, logits agree, and so does the gradient of every weight, on every rank."""
    saved = reference.weights
    assert saved.keys() == expected_shapes(ModelSpec.from_folder(reference.folder)).keys()
    assert {name for of_rank in got.weights for name in of_rank} == saved.keys()
    for of_rank in got.weights:
        assert not [name for name, tensor in of_rank.items() if not torch.equal(tensor, saved[name])]
    for index, expected in enumerate(reference.logits):
        torch.testing.assert_close(got.logits[index], expected, atol=2e-5, rtol=0.0)
    assert {name for of_rank in got.gradients for name in of_rank} == saved.keys()
    for of_rank in got.gradients:
        for name in of_rank.keys() & reference.gradients.keys():
            expected = reference.gradients[name]
            error = (of_rank[name] - expected).abs().max().item()
            assert error <= 1e-5 * expected.abs().max().item(), name
    assert {name for name in saved if name not in reference.gradients} == {name for name in saved if BIAS in name}
