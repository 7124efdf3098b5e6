"""A checkpoint folder by its config.json and the headers of its weights: nothing of the weights themselves is read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from slime_spec.checkpoints.file_names import INDEX, SINGLE
from slime_spec.errors import CheckpointError

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"}
NAMED_BY = {
    "model.hf_checkpoint": "--hf-checkpoint (a script: MODEL_DIR=DIR)",
    "speculative.draft_model_path": "--speculative-draft-model-path (a script: DRAFT_DIR=DIR)",
}
LENGTH_BYTES = 8  # a safetensors file begins with the length of its JSON header, little-endian
LONGEST_HEADER = 100_000_000  # the format's own bound


@dataclass(frozen=True)
class StoredTensor:
    """``StoredTensor("bfloat16", (4096, 12288), 100663296)``"""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """``tensors`` is None where the folder has no weights (a plan needs none)."""

    folder: str
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor] | None

    @classmethod
    def read(cls, folder: str, setting: str = "model.hf_checkpoint") -> Checkpoint:
        """Raises CheckpointError naming ``setting`` for a folder without config.json, the file for a damaged one."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise CheckpointError(
                setting,
                "must be a checkpoint folder with a config.json (nothing is downloaded)",
                folder,
                f"Pass {NAMED_BY[setting]} with the folder of the checkpoint.",
            )
        try:
            config = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise CheckpointError(
                str(path), f"must be JSON: {error}", path.name, "Copy the checkpoint again."
            ) from None
        # Multimodal checkpoints keep the language model's numbers one level down.
        return cls(folder, {**(config.get("text_config") or {}), **config}, stored_headers(Path(folder)))

    @property
    def architecture(self) -> str:
        return str((self.config.get("architectures") or ["?"])[0])

    @property
    def dtype(self) -> str | None:
        """The dtype that config.json names, else the one of most bytes of the weights; None where neither tells."""
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        if named is not None:
            return str(named).removeprefix("torch.")
        if not self.tensors:
            return None
        num_bytes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            num_bytes[tensor.dtype] += tensor.num_bytes
        return num_bytes.most_common(1)[0][0]

    @property
    def context_length(self) -> int | None:
        return self.config.get("max_position_embeddings")

    @property
    def vocab_size(self) -> int | None:
        return self.config.get("vocab_size")

    @property
    def num_mtp_layers(self) -> int:
        """MTP layers inside the checkpoint, under either of the two names configurations have for them."""
        return int(self.config.get("num_nextn_predict_layers") or self.config.get("mtp_num_hidden_layers") or 0)

    @property
    def num_bytes(self) -> int | None:
        """Bytes of the weights on disk."""
        return None if self.tensors is None else sum(tensor.num_bytes for tensor in self.tensors.values())


def stored_headers(folder: Path) -> dict[str, StoredTensor] | None:
    """Every tensor of the folder's safetensors files; raises CheckpointError for a file that is cut or no such file."""
    if (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        files = [folder / name for name in names if (folder / name).is_file()]
    else:
        files = [folder / SINGLE] if (folder / SINGLE).is_file() else []
    if not files:
        return None
    return {name: tensor for path in files for name, tensor in _header(path).items()}


def _header(path: Path) -> dict[str, StoredTensor]:
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        text = stream.read(length) if length <= LONGEST_HEADER else b""
    try:
        entries = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise CheckpointError(
            str(path), "must be a whole safetensors file", path.name, "Copy the checkpoint again."
        ) from None
    return {
        name: StoredTensor(
            DTYPES.get(entry["dtype"], str(entry["dtype"]).lower()),
            tuple(entry["shape"]),
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in entries.items()
        if name != "__metadata__"
    }
