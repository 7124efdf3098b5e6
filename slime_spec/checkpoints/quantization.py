"""Weights may be stored in fp8, as DeepSeek-V3's are: codes of one byte, and a scale for each block of them.

    X.weight            [out, in]                           e4m3
    X.weight_scale_inv  [⌈out / rows⌉, ⌈in / columns⌉]      fp32       value = code * scale of its block

Which tensors are stored so, the files' headers say; other tensors, among them embedding, head, norms and routers, are
numbers. Nothing here needs torch; ``slime_spec.checkpoints.fp8`` computes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from slime_spec.checkpoints.config_keys import (
    ANOTHER,
    Key,
    Keys,
    check_keys,
    entries,
    harmless,
    listed,
    only,
    shown,
    whole,
)
from slime_spec.checkpoints.folder import CheckpointFolder, StoredTensor
from slime_spec.errors import CheckpointError, NotComputedError

CODES, SCALES = "float8_e4m3fn", "float32"
SCALE = "_scale_inv"  # what the name of a weight's scales has behind the weight's name
KEY = "quantization_config"
# Ends of the names by which quantised checkpoints store the parts of a weight.
PARTS = (
    *(".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".weight_zero_point", ".weight_packed", ".weight_shape"),
    *(".qweight", ".qzeros", ".scales", ".g_idx", ".absmax", ".quant_map", ".SCB", ".weight_format", ".input_scale"),
)
UNQUANTIZED = "Choose the checkpoint of the unquantised weights, or let SGLang compute with these in rollouts alone."
MEND = "Copy the checkpoint again, or correct its config.json."
SERVED = "SGLang computes with other quantised weights, in rollouts alone"
# What quantization_config may say; which layers are not converted is read from the tensors themselves.
SCHEME_KEYS: Keys = {
    "quant_method": only("fp8"),
    "fmt": only("e4m3"),
    "activation_scheme": only("dynamic"),
    "weight_block_size": listed(whole(1, 2**20)),
    **dict.fromkeys(("scale_fmt", "kv_cache_scheme", "kv_cache_quant_algo"), only()),
    **dict.fromkeys(("modules_to_not_convert", "ignored_layers"), harmless("the tensors' own dtypes say it")),
}
REQUIRED = ("quant_method", "activation_scheme", "weight_block_size")  # by SGLang, too


@dataclass(frozen=True)
class BlockScheme:
    """Describes weights in fp8, of which ``rows`` x ``columns`` share a scale. DeepSeek's: ``BlockScheme(128, 128)``"""

    rows: int
    columns: int

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the scales of a weight [out, in], at whose edges blocks may be partial."""
        outputs, inputs = shape
        return -(-outputs // self.rows), -(-inputs // self.columns)

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a weight's codes and scales."""
        rows, columns = self.scale_shape(shape)
        return shape[0] * shape[1] + 4 * rows * columns


def is_fp8(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json says that weights are in fp8, in blocks or otherwise."""
    return (config.get(KEY) or {}).get("quant_method") == "fp8"


def scheme_of(config: Mapping[str, Any], source: str) -> BlockScheme | None:
    """Return how the config.json at ``source`` says that weights are stored in fp8; None for weights that are numbers.

    Raises NotComputedError naming the key of any other way to quantise weights.
    """
    setting, described = f"{source}: {KEY}", config.get(KEY)
    if not described:
        return None
    check_keys(config, {KEY: entries()}, source)
    for name, key in SCHEME_KEYS.items():
        value = described.get(name)
        if value is None and name in REQUIRED:
            raise NotComputedError(setting, f"must have {name} ({SERVED})", shown(described), ANOTHER)
        if value is not None and not key.accepts(value):
            rule = f"has {name}, which {_told(name, key)} ({SERVED})"
            raise NotComputedError(setting, rule, shown(value), ANOTHER)
    sizes = described["weight_block_size"]
    if len(sizes) != 2:
        rule = f"has weight_block_size, which must be two numbers, of rows and of columns ({SERVED})"
        raise NotComputedError(setting, rule, sizes[:4], ANOTHER)
    return BlockScheme(*sizes)


def _told(name: str, key: Key) -> str:
    return "must be two numbers, of rows and of columns" if name == "weight_block_size" else key.rule


def scheme_of_folder(folder: CheckpointFolder) -> BlockScheme | None:
    """Return the scheme of a checkpoint folder, whose headers fit it; see ``scheme_of`` and ``check_stored``."""
    scheme = scheme_of(folder.config, folder.source)
    check_stored(folder.tensors, scheme, str(folder.path))
    return scheme


def check_stored(stored: Mapping[str, StoredTensor], scheme: BlockScheme | None, folder: str) -> None:
    """Raise CheckpointError naming a tensor that ``scheme`` does not explain, by the files' headers alone.

    Such are codes without their scales, scales of another shape or dtype or without a weight, and parts of other ways
    to quantise weights.
    """
    for name, tensor in stored.items():
        if name.endswith(PARTS) and (scheme is None or not name.endswith(SCALE)):
            rule = "belongs to quantised weights, which are not computed here"
            raise CheckpointError(f"{folder}: {name}", rule, tensor.dtype, UNQUANTIZED)
    if scheme is None:
        return
    for name, tensor in stored.items():
        if name.endswith(SCALE):
            _check_weight(name.removesuffix(SCALE), stored, folder)
        elif tensor.dtype == CODES:
            _check_scales(name, stored, scheme, folder)


def _check_weight(name: str, stored: Mapping[str, StoredTensor], folder: str) -> None:
    weight = stored.get(name)
    if weight is None or weight.dtype != CODES:
        rule = f"must belong to a weight in fp8, {name}"
        what = "no such tensor" if weight is None else weight.dtype
        raise CheckpointError(f"{folder}: {name}{SCALE}", rule, what, MEND)


def _check_scales(name: str, stored: Mapping[str, StoredTensor], scheme: BlockScheme, folder: str) -> None:
    shape = stored[name].shape
    if len(shape) != 2:
        raise CheckpointError(
            f"{folder}: {name}", "must be a matrix, as fp8 has blocks of rows and columns", shape, MEND
        )
    scales = stored.get(name + SCALE)
    if scales is None:
        rule = "must be in the checkpoint: codes mean nothing without their scales"
        raise CheckpointError(f"{folder}: {name}{SCALE}", rule, "missing", MEND)
    expected = scheme.scale_shape(shape)
    if scales.shape != expected:
        rule = f"must have shape {expected}, a scale for each block of {scheme.rows} x {scheme.columns}"
        raise CheckpointError(f"{folder}: {name}{SCALE}", rule, scales.shape, MEND)
    if scales.dtype != SCALES:
        raise CheckpointError(f"{folder}: {name}{SCALE}", f"must be {SCALES}", scales.dtype, MEND)


def coded_names(names: Collection[str]) -> frozenset[str]:
    """Return the weights among ``names`` that are in fp8: they have scales."""
    return frozenset(name.removesuffix(SCALE) for name in names if name.endswith(SCALE))
