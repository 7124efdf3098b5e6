"""Llama, Qwen2, Qwen3, MiMo and their drafts share the names and shapes of this dense decoder layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slime_spec.checkpoints.model_spec import ModelSpec

Shapes = dict[str, tuple[int, ...]]


def block_shapes(prefix: str, spec: ModelSpec, input_size: int) -> Shapes:
    """Return the shapes of a decoder layer's attention (over ``input_size`` columns), the norm after it and the MLP."""
    hidden, inter, dim = spec.hidden_size, spec.intermediate_size, spec.head_dim
    rows = {"q": spec.num_heads * dim, "k": spec.num_kv_heads * dim, "v": spec.num_kv_heads * dim}
    shapes: Shapes = {f"{prefix}self_attn.{x}_proj.weight": (n, input_size) for x, n in rows.items()}
    if spec.qkv_bias:
        shapes |= {f"{prefix}self_attn.{x}_proj.bias": (n,) for x, n in rows.items()}
    if spec.qk_norm:
        shapes |= {f"{prefix}self_attn.{x}_norm.weight": (dim,) for x in "qk"}
    shapes[prefix + "self_attn.o_proj.weight"] = (hidden, rows["q"])
    shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
    shapes[prefix + "mlp.gate_proj.weight"] = (inter, hidden)
    shapes[prefix + "mlp.up_proj.weight"] = (inter, hidden)
    shapes[prefix + "mlp.down_proj.weight"] = (hidden, inter)
    return shapes
