"""Tiny checkpoints that SGLang itself loads: a policy, and drafts of every format for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.tiny_drafts import EAGLE, EAGLE3, make_tiny_draft
from tests.support.tiny_policy import make_tiny_policy

VOCABULARY = 257
FORMATS = {"EAGLE3": EAGLE3, "EAGLE": EAGLE}


def make_target(folder: Path, **overrides: Any) -> Path:
    """Four layers: SGLang's EAGLE-3 captures layer outputs 0, 1 and 2, and never the last one's."""
    return make_tiny_policy(folder, num_hidden_layers=4, **overrides)


def make_draft(folder: Path, target: Path, algorithm: str, seed: int = 0, **overrides: Any) -> Path:
    """A random draft; SGLang reads its config.json with transformers, which wants a model_type."""
    config = {**FORMATS[algorithm], "vocab_size": VOCABULARY, "model_type": "llama", **overrides}
    return make_tiny_draft(folder, target, config, seed)
