"""What a microbatch's layers save for their backward passes, by the kind of layer.

Counted is what PyTorch saves for the layers that the trainer builds, with RMSNorm written out in float32 (a fused
kernel saves less), and keys and values once more for responses that share a prompt. Of T tokens a tensor parallel rank
has

    hidden states    all T rows, or T / TP of them where a model has experts: its ranks are sequence-parallel
    in between       its columns of all T rows
    experts          the rows that they are sent: k for each of its T / TP, where routers spread tokens evenly
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slime_spec.checkpoints.families import family_of
from slime_spec.checkpoints.folder import architecture_of
from slime_spec.checkpoints.parameters import (
    expert_width,
    has_latent_attention,
    head_dim,
    layer_has_experts,
    num_experts,
    num_kv_heads,
)
from slime_spec.config.tree import TrainerConfig
from slime_spec.preflight.draft_memory import FLOAT32_BYTES

ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
MLP_COPIES = 5  # gate, up, the gate twice more, the product
EXPERT_COPIES = MLP_COPIES + 1  # and the product by the router's weight
# A router's scores and masks by expert, and by chosen expert the places to and fro.
ROUTER_BYTES, CHOICE_BYTES = 13, 32


@dataclass(frozen=True)
class _Widths:
    """Holds a rank's columns of attention: ``kept`` are those that queries, keys and values leave saved in all, before
    and after the rotation where both are, ``rotated`` are those of one head that positions rotate."""

    queries: int
    keys: int
    values: int
    kept: int
    out: int
    rotated: int


def microbatch_bytes_per_token(trainer: TrainerConfig, target: Mapping[str, Any], layers: range, in_flight: int) -> int:
    """Return the bytes per token of a stage's layers for the microbatches in flight.

    With recomputation a layer keeps its input; all that it saves, and the gradients of that, exist for one at a time.
    """
    of_layers = [layer_bytes_per_token(trainer, target, layer) for layer in layers]
    sent = max(_sent_bytes(trainer, target, layer) for layer in layers)
    if not trainer.recompute:
        return in_flight * sum(of_layers) + sent
    inputs = len(layers) * target["hidden_size"] * ITEMSIZES[trainer.dtype] // row_ranks(trainer, target)
    return in_flight * inputs + 2 * max(of_layers) + sent


def row_ranks(trainer: TrainerConfig, target: Mapping[str, Any]) -> int:
    """Return over how many ranks the rows of hidden states are split."""
    return trainer.tensor_model_parallel_size if num_experts(target) else 1


def norm_bytes(trainer: TrainerConfig, width: int) -> int:
    """Return what a norm saves for a row: its input and the normalised in float32, its output, and the root."""
    return (2 * FLOAT32_BYTES + ITEMSIZES[trainer.dtype]) * width + FLOAT32_BYTES


def layer_bytes_per_token(trainer: TrainerConfig, target: Mapping[str, Any], layer: int) -> int:
    """Return what one layer saves for the backward pass, for each of a microbatch's tokens."""
    itemsize, ranks = ITEMSIZES[trainer.dtype], trainer.tensor_model_parallel_size
    norms = 2 * norm_bytes(trainer, target["hidden_size"]) // row_ranks(trainer, target)
    attention = _latent_bytes if has_latent_attention(target) else _attention_bytes
    if layer_has_experts(target, layer):
        mlp = _expert_bytes(trainer, target)
    else:
        mlp = MLP_COPIES * target["intermediate_size"] // ranks * itemsize
    return norms + attention(trainer, target) + mlp


def _attention_bytes(trainer: TrainerConfig, target: Mapping[str, Any]) -> int:
    ranks, dim = trainer.tensor_model_parallel_size, head_dim(target)
    queries, keys = target["num_attention_heads"] * dim // ranks, num_kv_heads(target) * dim // ranks
    norms = 0
    if family_of(architecture_of(target)).qk_norm or target.get("use_qk_norm"):
        norms = norm_bytes(trainer, dim) * (queries + keys) // dim
    widths = _Widths(queries, keys, values=keys, kept=2 * (queries + keys) + keys, out=queries, rotated=dim)
    return norms + _core_bytes(trainer, target, widths)


def _latent_bytes(trainer: TrainerConfig, target: Mapping[str, Any]) -> int:
    """Return the bytes of latent attention, which a rank computes with its heads' keys and values written out."""
    ranks = trainer.tensor_model_parallel_size
    heads, rope, value = target["num_attention_heads"] // ranks, target["qk_rope_head_dim"], target["v_head_dim"]
    latents = [target["kv_lora_rank"], *([target["q_lora_rank"]] if target.get("q_lora_rank") else [])]
    norms = sum(norm_bytes(trainer, width) for width in latents) // row_ranks(trainer, target)
    nope, width = target["qk_nope_head_dim"], heads * (target["qk_nope_head_dim"] + rope)
    # Values are kept as they were computed, beside the keys' columns without a position.
    kept = 2 * width + heads * (nope + value)
    widths = _Widths(width, width, heads * value, kept=kept, out=heads * value, rotated=rope)
    return norms + _core_bytes(trainer, target, widths)


def _core_bytes(trainer: TrainerConfig, target: Mapping[str, Any], widths: _Widths) -> int:
    """Return the bytes of rotation and attention."""
    itemsize, attends_in = ITEMSIZES[trainer.dtype], ITEMSIZES[trainer.dtype]
    logarithms = FLOAT32_BYTES * target["num_attention_heads"] // trainer.tensor_model_parallel_size
    attention = (widths.kept + 2 * widths.out) * itemsize  # the output, and the input of the projection
    if trainer.num_gpus == 0 and trainer.dtype == "bfloat16":
        # A CPU attends in float32, to copies; the projection has the output rounded.
        attends_in = FLOAT32_BYTES
        copied = widths.queries + widths.keys + widths.values + widths.out
        attention = copied * attends_in + widths.out * itemsize
    # Responses that share a prompt have copies of its keys and values, and their outputs are joined.
    shared = (widths.out + 2 * (widths.keys + widths.values)) * attends_in
    return 4 * widths.rotated * itemsize + attention + logarithms + shared


def _expert_bytes(trainer: TrainerConfig, target: Mapping[str, Any]) -> int:
    """Return the bytes of a router, the rows that its experts are sent, and the shared experts."""
    itemsize, ranks = ITEMSIZES[trainer.dtype], trainer.tensor_model_parallel_size
    chosen, width = target.get("num_experts_per_tok") or 0, expert_width(target)
    shared = (target.get("n_shared_experts") or 0) * MLP_COPIES * width * itemsize
    routed = ROUTER_BYTES * num_experts(target) + chosen * (CHOICE_BYTES + EXPERT_COPIES * width * itemsize)
    return (routed + shared) // ranks + _sent_rows_bytes(trainer, target)


def _sent_rows_bytes(trainer: TrainerConfig, target: Mapping[str, Any]) -> int:
    """Return the bytes of the rows that a rank's experts are sent; ranks with slices of an expert get the same."""
    ranks = trainer.tensor_model_parallel_size
    slices = trainer.expert_tensor_parallel_size or ranks
    chosen: int = target.get("num_experts_per_tok") or 0
    return chosen * int(target["hidden_size"]) * ITEMSIZES[trainer.dtype] * slices // ranks


def _sent_bytes(trainer: TrainerConfig, target: Mapping[str, Any], layer: int) -> int:
    """Return the bytes of the buffers by which rows go to their experts and come back, for one layer at a time."""
    return 2 * _sent_rows_bytes(trainer, target) if layer_has_experts(target, layer) else 0
