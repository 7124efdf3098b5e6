"""The shared rotary frequencies are transformers', bit for bit."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.rope import inverse_frequencies
from tests.support.tiny_models import LLAMA3_ROPE
from tests.trainer.trainer_support import make_policy


@pytest.mark.parametrize(
    "rope", [{"rope_type": "default", "rope_theta": 10000.0}, LLAMA3_ROPE], ids=["plain", "llama3"]
)
def test_inverse_frequencies_equal_those_of_transformers(rope: dict[str, object], tmp_path: Path) -> None:
    folder = make_policy(tmp_path, "LlamaForCausalLM", head_dim=64, rope_parameters=rope)
    reference = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder)).inv_freq
    assert torch.equal(inverse_frequencies(ModelSpec.from_folder(folder)), reference)
