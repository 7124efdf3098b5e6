"""DFlash (arXiv 2602.06036) drafts a block in one pass: Qwen3 blocks over [target features | root, masks]; no own head.

The layout is SpecForge's and SGLang's ``DFlashDraftModel``. Every token of a block sees all of it. What other
checkpoints of this architecture add to it (Domino's head, convolutions, sinks, windows) is refused; DSpark's format is
made of the same parts (dspark.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slime_spec.checkpoints.config_keys import Keys, check_keys, entries, listed, only, whole
from slime_spec.checkpoints.families.blocks import block_shapes
from slime_spec.checkpoints.families.dense import Shapes
from slime_spec.checkpoints.families.draft_format import ANOTHER_DRAFT, DraftFormat, DraftReading
from slime_spec.checkpoints.families.family import MtpLayer
from slime_spec.checkpoints.families.qwen3 import QWEN3
from slime_spec.errors import CheckpointError

if TYPE_CHECKING:
    from slime_spec.checkpoints.draft_spec import DraftSpec

ARCHITECTURE = "DFlashDraftModel"
NESTED, LAYERS, MASK, BLOCK = "dflash_config", "target_layer_ids", "mask_token_id", "block_size"
FROM_ROOT, NUM_TARGET_LAYERS = "sample_from_anchor", "num_target_layers"
BLOCK_SIZES = whole(2, 128)
KEYS: Keys = {
    BLOCK: BLOCK_SIZES,
    NESTED: entries(),
    LAYERS: listed(whole(0)),
    MASK: whole(0),
    NUM_TARGET_LAYERS: whole(),
    FROM_ROOT: only(True, why="blocks of this kind are not computed"),
}
OTHER_HEAD = "another head of the block, or another block"
SHARED_KEYS: Keys = {
    BLOCK: BLOCK_SIZES,
    LAYERS: listed(whole(0)),
    MASK: whole(0),
    NUM_TARGET_LAYERS: whole(),
    **dict.fromkeys(("attention_sink_bias", "shift_label"), only(False, why=OTHER_HEAD)),
    **dict.fromkeys(
        ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k"), only(0, why=OTHER_HEAD)
    ),
    **dict.fromkeys(("pure_draft_prefix_len", "final_logit_softcapping"), only(0, why=OTHER_HEAD)),
    **dict.fromkeys(("output_multiplier", "attention_value_scale"), only(1, why=OTHER_HEAD)),
}
NESTED_KEYS: Keys = {
    **SHARED_KEYS,
    "projector_type": only("dflash", why=OTHER_HEAD),
    FROM_ROOT: only(True, why=OTHER_HEAD),
    "markov_rank": only(0, why=OTHER_HEAD),
}


def default_capture_layers(num_target_layers: int, num_layers: int) -> tuple[int, ...]:
    """Return the layers that DFlash reads where none are named: spread from the second to the third before the last."""
    if num_layers == 1:
        return (num_target_layers // 2,)
    span = num_target_layers - 4
    return tuple(round(1 + index * span / (num_layers - 1)) for index in range(num_layers))


def block_config(config: Mapping[str, Any], layer: MtpLayer | None, source: str) -> Mapping[str, Any]:
    if config.get("is_causal"):
        raise CheckpointError(
            f"{source}: is_causal", "must be false: a token of a block sees all of it here", True, "Use another draft."
        )
    return {name: value for name, value in config.items() if name != "is_causal"}


def _fields(read: DraftReading) -> dict[str, Any]:
    nested = nested_of(read.config)
    check_keys(nested, NESTED_KEYS, read.source, f"{NESTED}.")
    return block_fields(read, nested)


def block_fields(read: DraftReading, nested: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a draft whose keys were checked: ``nested`` says them, or else the config.json itself."""
    block_size, mask_token_id = (_number(read, nested, name) for name in (BLOCK, MASK))
    if mask_token_id >= read.target.vocab_size:
        rule = f"must be a row of the target's embedding, below {read.target.vocab_size}"
        raise CheckpointError(f"{read.source}: {MASK}", rule, mask_token_id, NAME_IT)
    made_for = nested.get(NUM_TARGET_LAYERS) or read.config.get(NUM_TARGET_LAYERS)
    if made_for not in (None, read.target.num_layers):
        rule = f"must be the target's num_hidden_layers ({read.target.num_layers})"
        raise CheckpointError(f"{read.source}: {NUM_TARGET_LAYERS}", rule, made_for, ANOTHER_DRAFT)
    return {
        "target_hidden_size": read.block.hidden_size,
        "draft_vocab_size": read.block.vocab_size,
        "capture_layers": _capture_layers(read, nested.get(LAYERS) or read.config.get(LAYERS)),
        "block_size": block_size,
        "mask_token_id": mask_token_id,
        "num_target_layers": read.target.num_layers,
    }


def _number(read: DraftReading, nested: Mapping[str, Any], name: str) -> int:
    """Return what the nested object or else the config.json itself says."""
    value: int | None = read.config.get(name) if nested.get(name) is None else nested[name]
    if value is None:
        raise CheckpointError(f"{read.source}: {name}", "must be given: blocks are made of it", None, NAME_IT)
    return value


def block_size_of(config: Mapping[str, Any]) -> int | None:
    """Return the size of a draft's blocks; None for a draft that has none, or does not say it in a number."""
    size = nested_of(config).get(BLOCK, config.get(BLOCK))
    return size if type(size) is int else None


def nested_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the object that the config.json may have for what is DFlash's own; nothing of one that is damaged."""
    nested = config.get(NESTED)
    return nested if isinstance(nested, dict) else {}


NAME_IT = "Name what the draft was trained with, or choose a draft made for this target."


def _capture_layers(read: DraftReading, named: list[int] | None) -> tuple[int, ...]:
    num_layers = read.target.num_layers
    layers = tuple(named or default_capture_layers(num_layers, read.block.num_layers))
    if not all(low < high for low, high in zip((-1, *layers), (*layers, num_layers), strict=True)):
        rule = f"must be layers of the target in ascending order, 0 to {num_layers - 1}"
        raise CheckpointError(f"{read.source}: {NESTED}.{LAYERS}", rule, list(layers), NAME_IT)
    return layers


def layer_shapes(spec: DraftSpec) -> Shapes:
    """Return the shapes of projection, layers and norms."""
    hidden = spec.block.hidden_size
    shapes: Shapes = {"fc.weight": (hidden, spec.feature_size), "hidden_norm.weight": (hidden,)}
    for layer in range(spec.block.num_layers):
        prefix = f"layers.{layer}."
        shapes |= {prefix + "input_layernorm.weight": (hidden,), **block_shapes(prefix, spec.block, hidden)}
    shapes["norm.weight"] = (hidden,)
    return shapes


def _config(spec: DraftSpec) -> dict[str, Any]:
    return {"architectures": [ARCHITECTURE], **layer_config(spec, spec.block_size, {})}


def layer_config(spec: DraftSpec, block_size: int, more: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of projection, layers and blocks, with ``more`` in the nested object."""
    return {
        BLOCK: block_size,
        NESTED: {MASK: spec.mask_token_id, LAYERS: list(spec.capture_layers), **more},
        NUM_TARGET_LAYERS: spec.num_target_layers,
        "layer_types": ["full_attention"] * spec.block.num_layers,
        "use_sliding_window": False,
        "sliding_window": None,
        "attention_bias": False,
    }


def _is_unread(name: str, spec: DraftSpec) -> bool:
    return name == "lm_head.weight"


def num_captured(config: Mapping[str, Any]) -> int:
    """Count the target's layers that the projection reads."""
    named = nested_of(config).get(LAYERS) or config.get(LAYERS)
    return len(named) if isinstance(named, list) else int(config["num_hidden_layers"])


def num_own_parameters(config: Mapping[str, Any]) -> int:
    """Count the parameters of the projection and its two norms."""
    return int(num_captured(config) * config["hidden_size"] ** 2 + 2 * config["hidden_size"])


def _num_block_drafts(config: Mapping[str, Any]) -> int | None:
    size = block_size_of(config)
    return None if size is None else size - 1


DFLASH = DraftFormat(
    family="dflash",
    blocks={ARCHITECTURE: QWEN3.architecture},
    block_config=block_config,
    fields=_fields,
    shapes=layer_shapes,
    config=_config,
    is_unread=_is_unread,
    num_own_parameters=num_own_parameters,
    num_block_drafts=_num_block_drafts,
    num_captured=num_captured,
    keys=KEYS,
    nested_keys={NESTED: NESTED_KEYS},
)
