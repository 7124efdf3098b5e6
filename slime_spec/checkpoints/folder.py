"""CheckpointFolder alone reads a checkpoint folder: its JSON files, its weights' files, and what their headers say.

Nothing here reads a weight or needs torch; ``slime_spec.checkpoints.tensors`` reads the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from slime_spec.checkpoints.config_keys import Keys, check_keys, entries, flag, listed, shown, text, whole
from slime_spec.checkpoints.families.eagle3 import CAPTURED
from slime_spec.errors import CheckpointError
from slime_spec.files import parse_json_object, read_json_object

CONFIG = "config.json"
QUANTIZATION = "hf_quant_config.json"  # where NVIDIA's ModelOpt describes quantised weights, and SGLang reads it
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"  # where EAGLE's authors keep drafts; an engine unpickles nothing
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
ITEMSIZES = {
    **{"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
MOST_DIMENSIONS = 64
NOWHERE = (-1, -1)
LENGTH_BYTES = 8  # a safetensors file begins with the length of its JSON header, little-endian
LONGEST_HEADER = 100_000_000  # the format's own bound; no JSON file of a checkpoint is longer
# Keys that describe a whole multimodal checkpoint; its text_config has the sizes of the language model.
OF_THE_WHOLE = ("architectures", "model_type", "auto_map")
SIZE, SIZE_BY_LAYER = whole(0), listed(whole(0), also_single=True)
LAYERS: Keys = {CAPTURED: listed(whole(0))}
# What readers may rely on in a config.json of any family, those that SGLang alone serves included.
ANY_FAMILY: Keys = {
    "architectures": listed(text()),
    **dict.fromkeys(("model_type", "dtype", "torch_dtype"), text()),
    **dict.fromkeys(("auto_map", "quantization_config", "eagle_config"), entries()),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "draft_vocab_size", "target_hidden_size"), SIZE),
    # transformers' own configuration, in SGLang's servers, makes lists of so many items.
    **dict.fromkeys(("num_hidden_layers", "num_labels"), whole(0, 4096)),
    **dict.fromkeys(("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_aux_hidden_states"), SIZE),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), SIZE),
    **dict.fromkeys(("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"), SIZE_BY_LAYER),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), SIZE_BY_LAYER),
    **dict.fromkeys(("n_routed_experts", "n_shared_experts", "num_experts", "num_local_experts"), SIZE_BY_LAYER),
    "first_k_dense_replace": SIZE,
    "mlp_only_layers": listed(whole(0)),
    **LAYERS,
    "tie_word_embeddings": flag(),
}


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
        """Return the keys of config.json, those of the language model in a multimodal checkpoint at the top as well.

        A description of quantised weights in a file of its own counts as ``quantization_config``.
        """
        stored = self.json(CONFIG)
        check_keys(stored, {"text_config": entries()}, self.source)
        whole = {key: stored[key] for key in OF_THE_WHOLE if key in stored}
        config = {**stored, **(stored.get("text_config") or {}), **whole}
        if not config.get("quantization_config") and self.has(QUANTIZATION):
            config["quantization_config"] = self.json(QUANTIZATION)
        check_keys(config, ANY_FAMILY, self.source)
        check_keys(config.get("eagle_config") or {}, LAYERS, self.source, "eagle_config.")
        return config

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
            if self.setting == DRAFT_PATH and self.has(PICKLED):
                remedy = f"Convert {PICKLED}: slime-spec draft convert --to sglang"
            raise CheckpointError(self.setting, f"must hold {SINGLE} or {INDEX}", str(self.path), remedy)
        absent = [name for name in names if not self.has(name)]
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
        there = [self.path / name for name in self._weight_names() if self.has(name)]
        return _stored(there) if there else None

    def json(self, name: str) -> dict[str, Any]:
        """Return the object in the JSON file ``name`` of the folder."""
        return read_json_object(self.file(name), CheckpointError, AGAIN)

    def has(self, name: str) -> bool:
        """Return whether the folder has a file of this name."""
        return _is_file(self.path / name)

    def file(self, name: str) -> Path:
        """Return the path of a text file of the folder; raises CheckpointError where there is none of a sane length."""
        path = self.path / name
        if not self.has(name):
            raise self._lacks(name)
        if path.stat().st_size > LONGEST_HEADER:
            raise CheckpointError(str(path), f"must be at most {LONGEST_HEADER} bytes long", name, AGAIN)
        return path

    def _lacks(self, name: str) -> CheckpointError:
        what = f"be a checkpoint folder with a {name}" if name == CONFIG else f"hold a {name}"
        remedy = REMEDIES.get(self.setting, "Pass a checkpoint folder.")
        return CheckpointError(self.setting, f"must {what}", str(self.path), remedy)

    def _weight_names(self) -> list[str]:
        if self.has(SINGLE):
            return [SINGLE]
        if not self.has(INDEX):
            return []
        places = self.json(INDEX).get("weight_map")
        if not isinstance(places, dict):
            raise CheckpointError(str(self.path / INDEX), "must have a weight_map", type(places).__name__, AGAIN)
        for place in places.values():
            if not (isinstance(place, str) and place.endswith(".safetensors") and Path(place).name == place):
                rule = "must name .safetensors files of this folder in its weight_map"
                raise CheckpointError(str(self.path / INDEX), rule, shown(place), AGAIN)
        return sorted(set(places.values()))


def architecture_of(config: Mapping[str, Any]) -> str:
    """Return the first of the architectures that a config.json names; "?" where it names none."""
    return str(next(iter(config.get("architectures") or ()), "?"))


def require(config: Mapping[str, Any], keys: Iterable[str], source: str) -> None:
    """Raise CheckpointError for a config.json without ``keys``."""
    if missing := [key for key in keys if config.get(key) is None]:
        raise CheckpointError(source, f"lacks {', '.join(missing)}", architecture_of(config), AGAIN)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, or a folder that may not be entered
        return False


def _stored(files: Iterable[Path]) -> dict[str, StoredTensor]:
    stored: dict[str, StoredTensor] = {}
    for path in files:
        header = _header(path)
        if repeated := stored.keys() & header.keys():
            raise CheckpointError(f"{path}: {min(repeated)}", "must be in one file alone", path.name, AGAIN)
        stored |= header
    return stored


def _header(path: Path) -> dict[str, StoredTensor]:
    damaged = CheckpointError(str(path), "must be a whole safetensors file", path.name, AGAIN)
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            text = stream.read(length) if length <= min(size, LONGEST_HEADER) else b""
        entries = parse_json_object(text.decode(), str(path), CheckpointError, AGAIN)
    except (OSError, UnicodeDecodeError, CheckpointError):
        raise damaged from None
    places = {name: _place(entry) for name, entry in entries.items() if name != "__metadata__"}
    end = 0
    for place in sorted(places.values()):
        if place == NOWHERE or place[0] != end:  # tensors neither overlap nor leave gaps
            raise damaged
        end = place[1]
    if LENGTH_BYTES + length + end != size:
        rule = f"must be a whole safetensors file of {LENGTH_BYTES + length + end} bytes"
        raise CheckpointError(str(path), rule, size, AGAIN)
    return {
        name: StoredTensor(
            DTYPES.get(entries[name]["dtype"], entries[name]["dtype"].lower()),
            tuple(entries[name]["shape"]),
            last - first,
        )
        for name, (first, last) in places.items()
    }


def _place(entry: Any) -> tuple[int, int]:
    """Return the bytes of a tensor that its entry in a header names; NOWHERE for what is no such entry."""
    if not isinstance(entry, dict):
        return NOWHERE
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        return NOWHERE
    if len(shape) > MOST_DIMENSIONS or not all(map(whole(0, 2**62).accepts, shape + offsets)):
        return NOWHERE
    num_bytes = offsets[1] - offsets[0]
    is_right = num_bytes == prod(shape) * ITEMSIZES[dtype] if dtype in ITEMSIZES else num_bytes >= 0
    return (offsets[0], offsets[1]) if is_right else NOWHERE
