"""Packed forward passes give every sample the logprobs, and every weight the gradient, of plain ones."""

from pathlib import Path
from typing import Any

import pytest
import torch

from slime_spec.types import TrainSample
from tests.support.tiny_models import LLAMA3_ROPE, load_reference
from tests.trainer.trainer_support import make_policy, run_ranks, tiny_config, tiny_samples

REAL_MODEL = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"
POLICIES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "llama, tied": ("LlamaForCausalLM", True, {}),
    "llama with scaled RoPE, untied": ("LlamaForCausalLM", False, {"rope_parameters": LLAMA3_ROPE}),
    "qwen2 with biases": ("Qwen2ForCausalLM", True, {}),
    "qwen3 with query and key norms": ("Qwen3ForCausalLM", False, {}),
    "as many key-value heads as heads": ("LlamaForCausalLM", True, {"num_key_value_heads": 4}),
}


def plain_logprobs(model: torch.nn.Module, sample: TrainSample) -> list[float]:
    """The response's logprobs from one unpacked forward."""
    with torch.no_grad():
        log_probs = model(torch.tensor([sample.token_ids])).logits[0].log_softmax(-1)
    return [log_probs[t - 1, sample.token_ids[t]].item() for t in range(sample.prompt_len, len(sample.token_ids))]


@pytest.mark.parametrize("policy", POLICIES)
def test_packed_logprobs_are_hugging_faces(policy: str, tmp_path: Path) -> None:
    architecture, tied, overrides = POLICIES[policy]
    folder = make_policy(tmp_path / "hf", architecture, tied, **overrides)
    samples = tiny_samples(num_prompts=4, group_size=3)
    config = tiny_config(folder, {"max_tokens_per_microbatch": 50})
    ((logprobs, _),) = run_ranks(1, "logprobs_and_gradients", config, samples, True)
    model = load_reference(folder)
    for sample, packed in zip(samples, logprobs, strict=True):
        assert packed == pytest.approx(plain_logprobs(model, sample), abs=2e-5)


@pytest.mark.parametrize("max_tokens", [40, 4096])
def test_sharing_prompts_changes_neither_logprobs_nor_gradients(max_tokens: int, tmp_path: Path) -> None:
    folder = make_policy(tmp_path / "hf", "Qwen3ForCausalLM")
    config = tiny_config(folder, {"max_tokens_per_microbatch": max_tokens})
    samples = tiny_samples(num_prompts=3, group_size=5)
    ((shared, shared_gradients),) = run_ranks(1, "logprobs_and_gradients", config, samples, True)
    ((plain, plain_gradients),) = run_ranks(1, "logprobs_and_gradients", config, samples, False)
    for one, other in zip(shared, plain, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert shared_gradients.keys() == plain_gradients.keys()
    for name, gradient in plain_gradients.items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(shared_gradients[name], gradient, atol=1e-5 * max(1.0, scale), rtol=0.0)


@pytest.mark.real_model
def test_the_real_models_packed_logprobs_are_hugging_faces() -> None:
    samples = tiny_samples(num_prompts=2, group_size=3, vocab_size=49152)
    ((logprobs, _),) = run_ranks(1, "logprobs_and_gradients", tiny_config(REAL_MODEL), samples, True)
    model = load_reference(REAL_MODEL)
    for sample, packed in zip(samples, logprobs, strict=True):
        assert packed == pytest.approx(plain_logprobs(model, sample), abs=1e-4)
