"""The layouts in which vLLM's speculators library keeps EAGLE-3, DFlash and DSpark drafts, as SGLang keeps them.

config.json has the draft's block under ``transformer_layer_config``, the rest beside it; captured layers are counted as
inputs (SGLang's outputs + 1), and ``norm_output`` means the recurrence, as in SGLang. Tensors of EAGLE-3's block begin
with ``layers.0.``; a copy of the target's embedding may be among them. A block drafter has copies of embedding and head
of the target, which its engines read; its blocks are counted with the root.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slime_spec.checkpoints.families.dflash import ARCHITECTURE as DFLASH
from slime_spec.checkpoints.families.dflash import BLOCK as BLOCK_SIZE
from slime_spec.checkpoints.families.dflash import FROM_ROOT, LAYERS, MASK, NESTED
from slime_spec.checkpoints.families.dspark import ARCHITECTURE as DSPARK
from slime_spec.checkpoints.families.dspark import KIND, RANK, RNN, VANILLA
from slime_spec.checkpoints.families.eagle3 import ARCHITECTURE, CAPTURED
from slime_spec.errors import CheckpointError

MODEL_TYPE, BLOCK = "speculators_model_type", "transformer_layer_config"
BESIDE = ("draft_vocab_size", "target_hidden_size", CAPTURED, "fc_norm", "norm_before_fc", "norm_before_residual")
THEIR_CAPTURED = "aux_hidden_state_layer_ids"
BLOCK_DRAFTERS = {"dflash": DFLASH, "dspark": DSPARK}
UNREAD = frozenset(("t2d", "d2t", "verifier_lm_head.weight", "verifier_norm.weight"))  # of a block drafter's tensors
# What their files leave out, as it is the default of transformers' Qwen3Config or of speculators' own configuration.
QWEN3_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}
DEFAULT_BLOCK_SIZE, DEFAULT_RANK = 8, 256


def is_of_speculators(config: Mapping[str, Any]) -> bool:
    return MODEL_TYPE in config


def as_sglang(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the config.json that SGLang and this project read; raises CheckpointError for another kind of draft."""
    block, kind = config.get(BLOCK), config.get(MODEL_TYPE)
    if kind not in ("eagle3", *BLOCK_DRAFTERS) or not isinstance(block, Mapping):
        rule = f"must be eagle3, {' or '.join(BLOCK_DRAFTERS)}, with its block under {BLOCK}"
        raise CheckpointError(f"{source}: {MODEL_TYPE}", rule, kind, "Choose another draft.")
    expected = "llama" if kind == "eagle3" else "qwen3"
    if block.get("model_type", expected) != expected:
        rule = f"must be {expected}: of this kind of draft no other blocks are computed here"
        raise CheckpointError(f"{source}: {BLOCK}.model_type", rule, block["model_type"], "Choose another draft.")
    inner = {name: value for name, value in block.items() if name not in ("architectures", "transformers_version")}
    dtype = config.get("torch_dtype") or config.get("dtype")
    own = _eagle3(config) if kind == "eagle3" else _block_drafter(config, {**QWEN3_DEFAULTS, **inner}, source)
    return {**inner, **own, **({"torch_dtype": dtype} if dtype else {})}


def _eagle3(config: Mapping[str, Any]) -> dict[str, Any]:
    beside = {name: config[name] for name in (*BESIDE, "norm_output") if config.get(name) is not None}
    if not beside.get("norm_output"):
        beside.pop("norm_output", None)  # present and false it would mean something else to SpecForge
    return {**beside, "architectures": [ARCHITECTURE]}


def _block_drafter(config: Mapping[str, Any], inner: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return a block drafter's keys, those of its block ``inner`` among them."""
    kind, layers = config[MODEL_TYPE], config.get(THEIR_CAPTURED)
    from_root = config.get(FROM_ROOT, kind == "dspark")
    vocab_size = config.get("draft_vocab_size", inner["vocab_size"])
    for name, value, is_so, rule in (
        (THEIR_CAPTURED, layers, not layers or min(layers) < 1, "must name inputs of layers, from 1 on"),
        (FROM_ROOT, from_root, kind == "dflash" and from_root, "must be false: such blocks are not computed"),
        (
            "draft_vocab_size",
            vocab_size,
            kind == "dspark" and vocab_size != inner["vocab_size"],
            "must be the target's",
        ),
    ):
        if is_so:
            raise CheckpointError(f"{source}: {name}", rule, value, "Choose another draft.")
    assert layers is not None, "they were checked"
    size = config.get(BLOCK_SIZE, DEFAULT_BLOCK_SIZE)
    own: dict[str, Any] = {
        **inner,
        "architectures": [BLOCK_DRAFTERS[kind]],
        BLOCK_SIZE: size if kind == "dflash" or from_root else size - 1,
        NESTED: {MASK: config.get(MASK), LAYERS: [layer - 1 for layer in layers]},
    }
    if kind == "dspark":
        kind = config.get(KIND, VANILLA)
        if kind == RNN and not from_root:
            # Training there begins the recurrence a row before the first draft, SGLang and DeepSpec at the first.
            rule = f"must not be {RNN} beside {FROM_ROOT} false: no engine begins the recurrence where they train it"
            raise CheckpointError(f"{source}: {KIND}", rule, kind, "Choose another draft.")
        own |= {FROM_ROOT: from_root, RANK: config.get(RANK, DEFAULT_RANK), KIND: kind}
    return own
