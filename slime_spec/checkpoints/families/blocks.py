"""A decoder layer's shapes are those of its attention, the norm after it, and its MLP or experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slime_spec.checkpoints.families.dense import Shapes, grouped_attention_shapes
from slime_spec.checkpoints.families.experts import expert_shapes, mlp_shapes
from slime_spec.checkpoints.families.latent import latent_shapes

if TYPE_CHECKING:
    from slime_spec.checkpoints.model_spec import ModelSpec


def block_shapes(prefix: str, spec: ModelSpec, input_size: int, layer: int = 0) -> Shapes:
    """Return the shapes of layer ``layer``, whose attention reads ``input_size`` columns, but its first norm's."""
    hidden = spec.hidden_size
    attention = grouped_attention_shapes if spec.latent is None else latent_shapes
    shapes = attention(prefix, spec, input_size)
    shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
    if spec.experts is not None and spec.experts.serve(layer):
        return shapes | expert_shapes(prefix, spec.experts, hidden)
    return shapes | mlp_shapes(prefix + "mlp.", hidden, spec.intermediate_size)
