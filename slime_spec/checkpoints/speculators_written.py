"""Drafts are written as vLLM's speculators library keeps them: the layouts of slime_spec.checkpoints.speculators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from slime_spec.checkpoints.draft_spec import DraftSpec, draft_config
from slime_spec.checkpoints.families.dflash import BLOCK as BLOCK_SIZE
from slime_spec.checkpoints.families.dflash import FROM_ROOT, MASK, NESTED
from slime_spec.checkpoints.families.dspark import KIND, RANK
from slime_spec.checkpoints.families.eagle3 import CAPTURED
from slime_spec.checkpoints.speculators import BESIDE, BLOCK, BLOCK_DRAFTERS, MODEL_TYPE, THEIR_CAPTURED
from slime_spec.errors import CheckpointError

OURS, THEIRS = "midlayer.", "layers.0."
ANOTHER_LAYOUT = "Pass --to sglang, or another draft."


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
        (not spec.capture_layers, "it reads the target's final state"),
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
