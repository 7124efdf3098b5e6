"""DeepSeek-V3 has latent attention: keys of config.json, tensor names, shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slime_spec.checkpoints.block_parts import LatentAttention
from slime_spec.checkpoints.config_keys import CORRECT, Keys, flag, harmless, whole
from slime_spec.errors import CheckpointError

if TYPE_CHECKING:
    from slime_spec.checkpoints.model_spec import ModelSpec

WIDTHS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
# Ends of names: SGLang makes one matrix of the two, and needs both at once.
LOADED_TOGETHER = (("self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight"),)
LATENT_KEYS: Keys = {
    **dict.fromkeys(WIDTHS, whole(1, 2**16)),
    "q_lora_rank": whole(1, 2**16),
    "rope_interleave": flag(),
    "num_key_value_heads": harmless("latent attention has keys and values for every head"),
    "head_dim": harmless("the widths above say it"),
    "qk_head_dim": harmless("the widths above say it"),
}


def latent_attention(config: Mapping[str, Any], source: str) -> LatentAttention:
    """Return the attention that ``config`` describes; raises CheckpointError naming a key that is left out."""
    if absent := [name for name in WIDTHS if config.get(name) is None]:
        raise CheckpointError(f"{source}: {absent[0]}", "must be given for latent attention", None, CORRECT)
    rank, nope, rope, value = (config[name] for name in WIDTHS)
    if rope % 2:
        raise CheckpointError(f"{source}: qk_rope_head_dim", "must be even: its halves are rotated", rope, CORRECT)
    if value > nope + rope:
        rule = f"must be at most qk_nope_head_dim + qk_rope_head_dim ({nope + rope}), the width of cached keys"
        raise CheckpointError(f"{source}: v_head_dim", rule, value, CORRECT)
    interleaved = config.get("rope_interleave")
    return LatentAttention(
        config.get("q_lora_rank"), rank, nope, rope, value, True if interleaved is None else interleaved
    )


def latent_shapes(prefix: str, spec: ModelSpec, input_size: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer's latent attention over ``input_size`` columns."""
    latent, heads = spec.latent, spec.num_heads
    assert latent is not None, "the layer has latent attention"
    queries = heads * latent.key_dim
    own = prefix + "self_attn."
    if latent.query_rank is None:
        shapes: dict[str, tuple[int, ...]] = {own + "q_proj.weight": (queries, input_size)}
    else:
        shapes = {
            own + "q_a_proj.weight": (latent.query_rank, input_size),
            own + "q_a_layernorm.weight": (latent.query_rank,),
            own + "q_b_proj.weight": (queries, latent.query_rank),
        }
    return shapes | {
        own + "kv_a_proj_with_mqa.weight": (latent.latent_rank + latent.rope_dim, input_size),
        own + "kv_a_layernorm.weight": (latent.latent_rank,),
        own + "kv_b_proj.weight": (heads * (latent.nope_dim + latent.value_dim), latent.latent_rank),
        own + "o_proj.weight": (spec.hidden_size, heads * latent.value_dim),
    }
