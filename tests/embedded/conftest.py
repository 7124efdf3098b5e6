"""Tiny checkpoints, written once per test session."""

from pathlib import Path

import pytest

from tests.support.tiny_models import make_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def micro_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven tokens and one layer: small enough to count what is sampled."""
    shape = {
        "vocab_size": 7,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "initializer_range": 0.3,
    }
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "micro", **shape)
