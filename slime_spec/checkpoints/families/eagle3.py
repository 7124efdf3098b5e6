"""EAGLE-3 (arXiv 2503.01840) has a Llama block over the features of several target layers, as SpecForge exports it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slime_spec.checkpoints.config_keys import (
    Keys,
    check_keys,
    entries,
    flag,
    listed,
    only,
    whole,
)
from slime_spec.checkpoints.families.blocks import block_shapes
from slime_spec.checkpoints.families.dense import Shapes
from slime_spec.checkpoints.families.draft_format import DraftFormat, DraftReading
from slime_spec.checkpoints.families.llama import LLAMA
from slime_spec.errors import CheckpointError

if TYPE_CHECKING:
    from slime_spec.checkpoints.draft_spec import DraftSpec

ARCHITECTURE = "LlamaForCausalLMEagle3"
D2T, T2D = TABLES = "d2t", "t2d"  # constants of a reduced vocabulary, which SGLang reads once, at its start
NUM_CAPTURED = 3  # layers, where config.json names none
CAPTURED, USES_LAYERS = "eagle_aux_hidden_state_layer_ids", "use_aux_hidden_state"
KEYS: Keys = {
    "draft_vocab_size": whole(),
    "target_hidden_size": whole(),
    "num_aux_hidden_states": whole(),
    "eagle_config": entries(),
    CAPTURED: listed(whole(0)),
    **dict.fromkeys(("bias", "fc_norm", "use_aux_norm", "norm_before_fc", "norm_output"), flag()),
    "norm_before_residual": flag(),  # vLLM's speculators
}
NESTED_KEYS: Keys = {
    CAPTURED: listed(whole(0)),
    "norm_before_fc": flag(),
    USES_LAYERS: flag(),
    # NVIDIA's ModelOpt.
    **dict.fromkeys(("use_input_layernorm_in_first_layer", "use_last_layernorm", "next_layer_regular"), only(True)),
    "use_mtp_layernorm": only(False),
    **dict.fromkeys(("parallel_draft_step", "parallel_draft_heads_num_layers"), only(1)),
}


def default_capture_layers(num_target_layers: int) -> tuple[int, ...]:
    """Return SGLang's and EAGLE's default: inputs of layers 2, n // 2 and n - 3, named as outputs of those before."""
    return tuple(layer - 1 for layer in (2, num_target_layers // 2, num_target_layers - 3))


def named_layers(config: Mapping[str, Any]) -> list[int] | None:
    """Return the layers that config.json names by their outputs (SGLang's key) or else by their inputs (vLLM's)."""
    nested: list[int] | None = (config.get("eagle_config") or {}).get(CAPTURED)
    return nested or [layer - 1 for layer in config.get(CAPTURED) or ()] or None


def _fields(read: DraftReading) -> dict[str, Any]:
    config, block, source = read.config, read.block, read.source
    eagle = config.get("eagle_config") or {}
    check_keys(eagle, NESTED_KEYS, source, "eagle_config.")
    draft_vocab = config.get("draft_vocab_size")
    tied = bool(config.get("tie_word_embeddings")) and draft_vocab in (None, block.vocab_size)
    if tied and not read.target.tie_word_embeddings:
        raise CheckpointError(
            f"{source}: tie_word_embeddings",
            "must be false: the draft shares the target's embedding, which is not the target's head",
            True,
            "Set it to false and keep lm_head.weight in the draft, or leave draft_vocab_size out.",
        )
    layers = _capture_layers(read) if reads_layers(config) else ()
    if not layers:
        _check_final_state(read)
    norm_output = config.get("norm_output")
    is_sglangs = read.convention == "sglang"
    target_hidden_size = config.get("target_hidden_size") or block.hidden_size
    return {
        "target_hidden_size": target_hidden_size,
        "draft_vocab_size": draft_vocab or block.vocab_size,
        "capture_layers": layers,
        "has_own_embedding": target_hidden_size != block.hidden_size,
        "has_own_head": draft_vocab is not None and not tied,
        "fc_bias": bool(config.get("bias", False)),
        "fc_norm": bool(config.get("fc_norm") or config.get("use_aux_norm")),
        "norm_before_fc": bool(eagle.get("norm_before_fc", config.get("norm_before_fc", False))),
        "logits_norm": True if is_sglangs or norm_output is None else bool(norm_output),
        "recurrent_norm": bool(norm_output) if is_sglangs else False,
        "residual_norm": bool(config.get("norm_before_residual")),
    }


def reads_layers(config: Mapping[str, Any]) -> bool:
    """Return whether the draft reads several layers; else the final state, after the target's norm, and has no fc."""
    return (config.get("eagle_config") or {}).get(USES_LAYERS) is not False


def _check_final_state(read: DraftReading) -> None:
    """Raise CheckpointError for what the final state, which no fc projects, contradicts."""
    config, eagle = read.config, read.config.get("eagle_config") or {}
    contradicting = {
        f"eagle_config.{CAPTURED}": eagle.get(CAPTURED),
        CAPTURED: config.get(CAPTURED),
        "num_aux_hidden_states": config.get("num_aux_hidden_states"),
        **{name: config.get(name) for name in ("fc_norm", "use_aux_norm", "norm_before_fc", "bias")},
        "eagle_config.norm_before_fc": eagle.get("norm_before_fc"),
    }
    size = config.get("target_hidden_size")
    if size not in (None, read.block.hidden_size):
        contradicting["target_hidden_size"] = size
    for name, value in contradicting.items():
        if value:
            rule = f"must be left out beside eagle_config.{USES_LAYERS} false: the final state is read as it is"
            raise CheckpointError(f"{read.source}: {name}", rule, value, f"Correct it, or {USES_LAYERS}.")


def _capture_layers(read: DraftReading) -> tuple[int, ...]:
    num_layers = read.target.num_layers
    named = named_layers(read.config)
    if (outside := read.config.get(CAPTURED)) and named != [layer - 1 for layer in outside]:
        raise CheckpointError(
            f"{read.source}: {CAPTURED}",
            f"must name the inputs of the layers whose outputs eagle_config names ({named}): each is one more",
            outside,
            "Leave one of them out.",
        )
    # The target hands its layers out from the lowest up, in whatever order a config lists them.
    layers = tuple(sorted(named)) if named else default_capture_layers(num_layers)
    if min(layers) < 0 or max(layers) >= num_layers or len(set(layers)) < len(layers):
        raise CheckpointError(
            f"{read.source}: eagle_config.{CAPTURED}",
            f"must be different layers of the target, 0 to {num_layers - 1}"
            + ("" if named else ", and by default they are the layers before 2, n // 2 and n - 3"),
            list(layers),
            "Name the layers the draft was trained on, or choose a draft made for this target.",
        )
    count = read.config.get("num_aux_hidden_states")
    if count is not None and count != len(layers):
        raise CheckpointError(
            f"{read.source}: num_aux_hidden_states",
            f"must be the number of captured layers ({len(layers)}: {', '.join(map(str, layers))})",
            count,
            f"Name the layers in eagle_config.{CAPTURED}.",
        )
    return layers


def _shapes(spec: DraftSpec) -> Shapes:
    hidden = spec.block.hidden_size
    shapes: Shapes = {"fc.weight": (hidden, spec.feature_size)} if spec.capture_layers else {}
    if spec.fc_bias:
        shapes["fc.bias"] = (hidden,)
    if spec.norm_before_fc:
        shapes["input_norm.weight"] = (spec.feature_size,)
    if spec.fc_norm:
        for index in range(len(spec.capture_layers)):
            shapes[f"fc_norm.{index}.weight"] = (spec.target_hidden_size,)
    for layer in range(spec.block.num_layers):
        prefix = "midlayer." if layer == 0 else f"layers.{layer}."
        if layer == 0:
            shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "hidden_norm.weight"] = (hidden,)
        shapes |= block_shapes(prefix, spec.block, 2 * hidden if layer == 0 else hidden)
    shapes["norm.weight"] = (hidden,)
    return shapes


def _config(spec: DraftSpec) -> dict[str, Any]:
    config: dict[str, Any] = {"architectures": [ARCHITECTURE], "bias": spec.fc_bias}
    config["draft_vocab_size"] = spec.draft_vocab_size if spec.has_own_head else None  # SGLang wants the key
    config["target_hidden_size"] = spec.target_hidden_size
    if spec.capture_layers:
        config["num_aux_hidden_states"] = len(spec.capture_layers)
        nested = {CAPTURED: list(spec.capture_layers), USES_LAYERS: True, "norm_before_fc": spec.norm_before_fc}
        config["eagle_config"] = nested
        config[CAPTURED] = [layer + 1 for layer in spec.capture_layers]  # vLLM reads this key, and counts inputs
    else:
        config["eagle_config"] = {USES_LAYERS: False}
    config["fc_norm"] = spec.fc_norm
    if spec.residual_norm:
        config["norm_before_residual"] = True
    # Absent, the key means logits after the norm and a recurrence before it in both conventions; present, it means
    # the recurrence to SGLang and the logits to SpecForge.
    if (spec.logits_norm, spec.recurrent_norm) != (True, False):
        config["norm_output"] = spec.recurrent_norm
    return config


def _is_unread(name: str, spec: DraftSpec) -> bool:
    """Return whether the tensor is a norm that this draft does not use."""
    return name.startswith("layers.") and name.endswith(".input_layernorm.weight")


def num_captured(config: Mapping[str, Any]) -> int:
    """Count the layers that the draft reads; 0 for the final state."""
    return (len(named_layers(config) or ()) or NUM_CAPTURED) if reads_layers(config) else 0


def _num_own_parameters(config: Mapping[str, Any]) -> int:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    features = num_captured(config) * (config.get("target_hidden_size") or hidden)
    head = (config.get("draft_vocab_size") or 0) * hidden
    qkv_heads = heads + 2 * (config.get("num_key_value_heads") or heads)
    wider_attention = qkv_heads * (config.get("head_dim") or hidden // heads) * hidden
    return int(features * hidden + head + wider_attention + hidden)


EAGLE3 = DraftFormat(
    family="eagle3",
    blocks={ARCHITECTURE: LLAMA.architecture},
    served=("Eagle3DeepseekV2ForCausalLM",),
    fields=_fields,
    shapes=_shapes,
    config=_config,
    is_unread=_is_unread,
    renamed={
        "layers.0.": "midlayer.",
        "aux_norm_low.": "fc_norm.0.",  # the older names of the norms of captured layers
        "aux_norm_mid.": "fc_norm.1.",
        "aux_norm_high.": "fc_norm.2.",
    },
    has_tables=True,
    num_own_parameters=_num_own_parameters,
    num_captured=num_captured,
    keys=KEYS,
    nested_keys={"eagle_config": NESTED_KEYS},
)
