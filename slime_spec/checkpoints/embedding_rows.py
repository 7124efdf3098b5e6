"""A plan compares a few rows of a draft's embedding with the target's: without torch, of large files a few pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slime_spec.checkpoints.folder import AGAIN, DRAFT_PATH, LENGTH_BYTES, CheckpointFolder
from slime_spec.errors import CheckpointError
from slime_spec.files import parse_json_object

NUM_ROWS = 32
ROUNDED = 2.0**-7  # a copy in another dtype is within so much of what it was
OWN, TARGETS = ("embed_tokens.weight", "model.embed_tokens.weight"), ("model.embed_tokens.weight",)
NUMBERS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def embeds_otherwise(draft: str, target: str) -> bool:
    """Return whether the draft's folder has an embedding of the target's shape with other numbers.

    False where either folder has none, as that of a plan without weights.
    """
    own = _rows(CheckpointFolder(Path(draft), DRAFT_PATH), OWN)
    shared = _rows(CheckpointFolder(Path(target)), TARGETS)
    if own is None or shared is None or own.shape != shared.shape:
        return False
    return not np.allclose(own, shared, rtol=ROUNDED, atol=1e-6)


def _rows(folder: CheckpointFolder, names: tuple[str, ...]) -> NDArray[np.float32] | None:
    """Return rows [rows, hidden] spread over the first of these tensors that there is."""
    tensors = folder.tensors_there or {}  # whose headers are checked with it
    name = next((each for each in names if each in tensors and len(tensors[each].shape) == 2), None)
    if name is None:
        return None
    path = next(path for path in folder.weight_files if name in _header(path)[0])
    header, begin = _header(path)
    dtype = NUMBERS.get(header[name]["dtype"])
    num_rows, width = tensors[name].shape
    if dtype is None or not num_rows or not width:
        return None
    spread = np.linspace(0, num_rows - 1, min(NUM_ROWS, num_rows)).astype(int)
    begin += header[name]["data_offsets"][0]
    stored = np.memmap(path, np.dtype(dtype), mode="r", offset=begin, shape=(num_rows, width))[spread]
    if header[name]["dtype"] == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(stored, np.float32)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Return what a safetensors file says of its tensors, and where their bytes begin."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        text = stream.read(length).decode()
    return parse_json_object(text, str(path), CheckpointError, AGAIN), LENGTH_BYTES + length
