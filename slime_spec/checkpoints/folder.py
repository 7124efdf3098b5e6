"""CheckpointFolder alone reads a checkpoint folder: its JSON files, its weights' files, and what their headers say.

Nothing here reads a weight or needs torch; ``slime_spec.checkpoints.tensors`` reads the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from slime_spec.errors import CheckpointError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TARGET_PATH = "model.hf_checkpoint"
DRAFT_PATH = "speculative.draft_model_path"
# The setting that names a folder -> what to do where the folder is not a checkpoint.
REMEDIES = {
    TARGET_PATH: "Pass --hf-checkpoint DIR (a script: MODEL_DIR=DIR), or make one with: "
    "slime-spec models fetch smollm2-135m",
    DRAFT_PATH: "Pass --sglang-speculative-draft-model-path DIR (a script: DRAFT_DIR=DIR) with a draft made for this "
    "target.",
}
AGAIN = "Copy the checkpoint again."
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"}
LENGTH_BYTES = 8  # a safetensors file begins with the length of its JSON header, little-endian
LONGEST_HEADER = 100_000_000  # the format's own bound
# Keys that describe a whole multimodal checkpoint; its text_config has the sizes of the language model.
OF_THE_WHOLE = ("architectures", "model_type", "auto_map")


@dataclass(frozen=True)
class StoredTensor:
    """Describes a stored tensor: dtype, shape, bytes. E.g. ``StoredTensor("bfloat16", (4096, 12288), 100663296)``"""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class CheckpointFolder:
    """Reads a checkpoint folder, each file when it is asked for, once. ``setting`` is the setting that named it.

    Every property raises CheckpointError: naming ``setting`` for what the folder lacks, the file for a damaged one.
    """

    path: Path
    setting: str = TARGET_PATH

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """Return the keys of config.json, those of the language model in a multimodal checkpoint at the top as well."""
        stored = self.json(CONFIG)
        whole = {key: stored[key] for key in OF_THE_WHOLE if key in stored}
        return {**stored, **(stored.get("text_config") or {}), **whole}

    @property
    def source(self) -> str:
        """Return the path that errors name for config.json."""
        return str(self.path / CONFIG)

    @property
    def architecture(self) -> str:
        return architecture_of(self.config)

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """Return the files of the weights; raises where a file is missing."""
        if not self.path.is_dir():
            raise self._lacks(CONFIG)
        names = self._weight_names()
        if not names:
            remedy = REMEDIES[TARGET_PATH]
            if self.setting != TARGET_PATH:
                remedy = "Pass the folder of a checkpoint with its weights."
            raise CheckpointError(self.setting, f"must hold {SINGLE} or {INDEX}", str(self.path), remedy)
        absent = [name for name in names if not (self.path / name).is_file()]
        if absent:
            rule = f"lacks {', '.join(absent)}, which {INDEX} names"
            raise CheckpointError(str(self.path), rule, self.path.name, AGAIN)
        return tuple(self.path / name for name in names)

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Return every stored tensor, from the files' headers alone."""
        return _stored(self.weight_files)

    @property
    def tensors_there(self) -> Mapping[str, StoredTensor] | None:
        """Return the tensors of the weight files that exist; None for a folder without weights (a plan needs none)."""
        there = [self.path / name for name in self._weight_names() if (self.path / name).is_file()]
        return _stored(there) if there else None

    def json(self, name: str) -> dict[str, Any]:
        """Return the object in the JSON file ``name`` of the folder."""
        path = self.path / name
        if not path.is_file():
            raise self._lacks(name)
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(str(path), f"must be valid JSON: {error}", name, AGAIN) from None
        if not isinstance(value, dict):
            raise CheckpointError(str(path), "must be a JSON object", type(value).__name__, AGAIN)
        return value

    def _lacks(self, name: str) -> CheckpointError:
        what = f"be a checkpoint folder with a {name}" if name == CONFIG else f"hold a {name}"
        remedy = REMEDIES.get(self.setting, "Pass a checkpoint folder.")
        return CheckpointError(self.setting, f"must {what}", str(self.path), remedy)

    def _weight_names(self) -> list[str]:
        if (self.path / SINGLE).is_file():
            return [SINGLE]
        if not (self.path / INDEX).is_file():
            return []
        places = self.json(INDEX).get("weight_map")
        if not isinstance(places, dict):
            raise CheckpointError(str(self.path / INDEX), "must have a weight_map", type(places).__name__, AGAIN)
        return sorted(set(places.values()))


def architecture_of(config: Mapping[str, Any]) -> str:
    """Return the first of the architectures that a config.json names; "?" where it names none."""
    return str((config.get("architectures") or ["?"])[0])


def require(config: Mapping[str, Any], keys: Iterable[str], source: str) -> None:
    """Raise CheckpointError for a config.json without ``keys``."""
    if missing := [key for key in keys if config.get(key) is None]:
        raise CheckpointError(source, f"lacks {', '.join(missing)}", architecture_of(config), AGAIN)


def _stored(files: Iterable[Path]) -> dict[str, StoredTensor]:
    return {name: tensor for path in files for name, tensor in _header(path).items()}


def _header(path: Path) -> dict[str, StoredTensor]:
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        text = stream.read(length) if length <= LONGEST_HEADER else b""
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, AttributeError, LookupError, TypeError):
        raise CheckpointError(str(path), "must be a whole safetensors file", path.name, AGAIN) from None
    if LENGTH_BYTES + length + end != path.stat().st_size:
        rule = f"must be a whole safetensors file of {LENGTH_BYTES + length + end} bytes"
        raise CheckpointError(str(path), rule, path.stat().st_size, AGAIN)
    return {
        name: StoredTensor(
            DTYPES.get(entry["dtype"], str(entry["dtype"]).lower()),
            tuple(entry["shape"]),
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in entries.items()
    }
