"""The layouts in which vLLM's speculators library keeps EAGLE-3, DFlash and DSpark drafts, to and from SGLang's.

config.json has the draft's block under ``transformer_layer_config``, the rest beside it; captured layers are counted as
inputs (SGLang's outputs + 1), and ``norm_output`` means the recurrence, as in SGLang. Tensors of EAGLE-3's block begin
with ``layers.0.``; a copy of the target's embedding may be among them. A block drafter has copies of embedding and head
of the target, which its engines read; its blocks are counted with the root.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from slime_spec.checkpoints.draft_spec import DraftSpec, draft_config
from slime_spec.checkpoints.families.dflash import ARCHITECTURE as DFLASH
from slime_spec.checkpoints.families.dflash import BLOCK as BLOCK_SIZE
from slime_spec.checkpoints.families.dflash import FROM_ROOT, LAYERS, MASK, NESTED
from slime_spec.checkpoints.families.dspark import ARCHITECTURE as DSPARK
from slime_spec.checkpoints.families.dspark import KIND, RANK, RNN, VANILLA
from slime_spec.checkpoints.families.eagle3 import ARCHITECTURE, CAPTURED
from slime_spec.errors import CheckpointError

MODEL_TYPE, BLOCK = "speculators_model_type", "transformer_layer_config"
BESIDE = ("draft_vocab_size", "target_hidden_size", CAPTURED, "fc_norm", "norm_before_fc", "norm_before_residual")
OURS, THEIRS = "midlayer.", "layers.0."
ANOTHER_LAYOUT = "Pass --to sglang, or another draft."
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


def as_speculators(spec: DraftSpec, target: str, target_architecture: str, dtype: str) -> dict[str, Any]:
    """Return the config.json of ``spec``, for a target of that name or path; raises CheckpointError if it has none."""
    own = _as_block_drafter(spec) if spec.family in BLOCK_DRAFTERS else _as_eagle3(spec)
    return {
        **own,
        MODEL_TYPE: spec.family,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "speculators_config": {
            "algorithm": spec.family,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": spec.num_block_drafts or 3}],
            "verifier": {"name_or_path": target, "architectures": [target_architecture]},
        },
    }


def _as_block_drafter(spec: DraftSpec) -> dict[str, Any]:
    whole = draft_config(spec)
    beside = (BLOCK_SIZE, NESTED, FROM_ROOT, RANK, KIND, "architectures", "enable_confidence_head")
    own: dict[str, Any] = {
        "architectures": [BLOCK_DRAFTERS[spec.family]],
        BLOCK: {name: value for name, value in whole.items() if name not in beside},
        "draft_vocab_size": spec.draft_vocab_size,
        BLOCK_SIZE: spec.block_size,
        MASK: spec.mask_token_id,
        THEIR_CAPTURED: [layer + 1 for layer in spec.capture_layers],
        FROM_ROOT: spec.family == "dspark" and spec.drafts_from_root,
    }
    if spec.family == "dspark":
        own |= {RANK: spec.markov_rank, KIND: spec.markov_kind, "enable_confidence_head": False}
    return own


def _as_eagle3(spec: DraftSpec) -> dict[str, Any]:
    for is_so, what in (
        (spec.family != "eagle3", f"it is of the format {spec.family}"),
        (not spec.has_own_head, "it has no head of its own"),
        (spec.fc_bias, "its fc has a bias"),
        (not spec.logits_norm, "its head reads states before the norm"),
        (spec.norm_before_fc and spec.fc_norm, "it norms its features twice"),
    ):
        if is_so:
            rule = f"speculators has no layout for this draft: {what}"
            raise CheckpointError("--to", rule, "speculators", ANOTHER_LAYOUT)
    whole = draft_config(spec)
    inner = {name: value for name, value in whole.items() if name not in (*BESIDE, "architectures", "eagle_config")}
    for name in ("bias", "num_aux_hidden_states", "norm_output"):
        inner.pop(name, None)
    own_size = None if spec.target_hidden_size == spec.block.hidden_size else spec.target_hidden_size
    return {
        "architectures": ["Eagle3DraftModel"],
        BLOCK: {**inner, "attention_bias": False, "mlp_bias": False},
        "draft_vocab_size": spec.draft_vocab_size,
        "target_hidden_size": own_size,
        CAPTURED: [layer + 1 for layer in spec.capture_layers],
        "fc_norm": spec.fc_norm,
        "norm_before_fc": spec.norm_before_fc,
        "norm_before_residual": spec.residual_norm,
        "norm_output": spec.recurrent_norm,
    }


def their_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of ``draft_shapes`` under speculators' names."""
    return {THEIRS + name.removeprefix(OURS) if name.startswith(OURS) else name: each for name, each in tensors.items()}
