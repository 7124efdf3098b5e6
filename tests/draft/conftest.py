"""Tiny targets, written once per test session."""

from pathlib import Path

import pytest

from tests.support.tiny_models import make_tiny_checkpoint


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four layers."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("target") / "llama", num_hidden_layers=4)
