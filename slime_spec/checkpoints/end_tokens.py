"""Which tokens end a checkpoint's responses."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path


def eos_ids(folder: str | Path, from_config: Iterable[int]) -> frozenset[int]:
    """End-of-sequence tokens of config.json and of generation_config.json (chat models name more of them there)."""
    path = Path(folder) / "generation_config.json"
    extra = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    return frozenset([*from_config, *listed(extra)])


def listed(eos_token_id: int | list[int] | None) -> list[int]:
    """The several shapes of that key as a list."""
    if eos_token_id is None:
        return []
    return eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
