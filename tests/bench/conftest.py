"""A tiny policy with a tokenizer, and an EAGLE-3 draft for it, for the benchmarks that take both from folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny_drafts import EAGLE3, make_tiny_draft
from tests.support.tiny_policy import make_tiny_policy


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_policy(tmp_path_factory.mktemp("tune") / "policy")


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory, policy: Path) -> Path:
    return make_tiny_draft(tmp_path_factory.mktemp("tune") / "draft", policy, {**EAGLE3, "vocab_size": 257})
