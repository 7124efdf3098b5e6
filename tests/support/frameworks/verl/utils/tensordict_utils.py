"""verl's reading of a batch (verl/utils/tensordict_utils.py, 1dda039b9); a batch is a dict here."""

from __future__ import annotations

from typing import Any


def get_non_tensor_data(data: dict[str, Any], key: str, default: Any) -> Any:
    return data.get(key, default)
