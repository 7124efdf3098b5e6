"""The layout in which vLLM's speculators library keeps an EAGLE-3 draft, to and from SGLang's.

config.json has the draft's block under ``transformer_layer_config``, the rest beside it; captured layers are counted as
inputs (SGLang's outputs + 1), and ``norm_output`` means the recurrence, as in SGLang. Tensors of the block begin with
``layers.0.``; a copy of the target's embedding may be among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from slime_spec.checkpoints.draft_spec import DraftSpec, draft_config
from slime_spec.checkpoints.families.eagle3 import ARCHITECTURE, CAPTURED
from slime_spec.errors import CheckpointError

MODEL_TYPE, BLOCK = "speculators_model_type", "transformer_layer_config"
BESIDE = ("draft_vocab_size", "target_hidden_size", CAPTURED, "fc_norm", "norm_before_fc", "norm_before_residual")
OURS, THEIRS = "midlayer.", "layers.0."
ANOTHER_LAYOUT = "Pass --to sglang, or another draft."


def is_of_speculators(config: Mapping[str, Any]) -> bool:
    return MODEL_TYPE in config


def as_sglang(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the config.json that SGLang and this project read; raises CheckpointError for another kind of draft."""
    block = config.get(BLOCK)
    if config.get(MODEL_TYPE) != "eagle3" or not isinstance(block, Mapping):
        rule = f"must be eagle3, with its block under {BLOCK}"
        raise CheckpointError(f"{source}: {MODEL_TYPE}", rule, config.get(MODEL_TYPE), "Choose an EAGLE-3 draft.")
    if block.get("model_type", "llama") != "llama":
        rule = "must be llama: other blocks norm queries and keys, which this project's EAGLE-3 does not"
        raise CheckpointError(f"{source}: {BLOCK}.model_type", rule, block["model_type"], "Choose another draft.")
    beside = {name: config[name] for name in (*BESIDE, "norm_output") if config.get(name) is not None}
    if not beside.get("norm_output"):
        beside.pop("norm_output", None)  # present and false it would mean something else to SpecForge
    inner = {name: value for name, value in block.items() if name not in ("architectures", "transformers_version")}
    dtype = config.get("torch_dtype") or config.get("dtype")
    return {**inner, **beside, "architectures": [ARCHITECTURE], **({"torch_dtype": dtype} if dtype else {})}


def as_speculators(spec: DraftSpec, target: str, target_architecture: str, dtype: str) -> dict[str, Any]:
    """Return the config.json of ``spec``, for a target of that name or path; raises CheckpointError if it has none."""
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
        MODEL_TYPE: "eagle3",
        BLOCK: {**inner, "attention_bias": False, "mlp_bias": False},
        "draft_vocab_size": spec.draft_vocab_size,
        "target_hidden_size": own_size,
        CAPTURED: [layer + 1 for layer in spec.capture_layers],
        "fc_norm": spec.fc_norm,
        "norm_before_fc": spec.norm_before_fc,
        "norm_before_residual": spec.residual_norm,
        "norm_output": spec.recurrent_norm,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"name_or_path": target, "architectures": [target_architecture]},
        },
    }


def their_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of ``draft_shapes`` under speculators' names."""
    return {THEIRS + name.removeprefix(OURS) if name.startswith(OURS) else name: each for name, each in tensors.items()}
