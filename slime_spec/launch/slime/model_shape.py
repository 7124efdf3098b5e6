"""Flags of slime that say a model's shape (those of its scripts/models/) are compared with the model's config.json.

A script that names another model's shape than its checkpoint has is a mistake that would otherwise go unseen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from slime_spec.errors import ConfigError, raise_all
from slime_spec.files import read_json_object

# Megatron's flag -> where a config.json has the number: any of these keys, also inside text_config.
NUMBERS: Mapping[str, tuple[str, ...]] = {
    "--num-layers": ("num_hidden_layers",),
    "--hidden-size": ("hidden_size",),
    "--num-attention-heads": ("num_attention_heads",),
    "--num-query-groups": ("num_key_value_heads",),
    "--norm-epsilon": ("rms_norm_eps",),
    "--rotary-base": ("rope_theta",),
    "--rotary-percent": ("partial_rotary_factor",),
    "--num-experts": ("num_experts", "n_routed_experts", "num_local_experts"),
    "--moe-ffn-hidden-size": ("moe_intermediate_size",),
    "--moe-router-topk": ("num_experts_per_tok",),
    "--q-lora-rank": ("q_lora_rank",),
    "--kv-lora-rank": ("kv_lora_rank",),
    "--qk-head-dim": ("qk_nope_head_dim",),
    "--qk-pos-emb-head-dim": ("qk_rope_head_dim",),
    "--v-head-dim": ("v_head_dim",),
    "--vocab-size": ("vocab_size",),
}
# What else slime's scripts/models/ say; the config.json says these things in other words, or per kind of layer.
_VALUES = """
--ffn-hidden-size --kv-channels --normalization --position-embedding-type --moe-layer-freq --moe-router-score-function
--model-name
--moe-shared-expert-intermediate-size --moe-router-group-topk --moe-router-num-groups --moe-router-topk-scaling-factor
--mscale --mscale-all-dim --rotary-scaling-factor --make-vocab-size-divisible-by --padded-vocab-size --seq-length
--max-position-embeddings
"""
_SWITCHES = """
--swiglu --disable-bias-linear --add-qkv-bias --qk-layernorm --untie-embeddings-and-output-weights
--group-query-attention --multi-latent-attention --apply-layernorm-1p --attention-output-gate --use-gated-attention
--moe-shared-expert-gate --moe-router-pre-softmax --moe-router-enable-expert-bias --post-self-attn-layernorm
--post-mlp-layernorm --rotary-interleaved --no-position-embedding --use-rotary-position-embeddings --use-rope-scaling
"""
VALUES, SWITCHES = tuple(_VALUES.split()), tuple(_SWITCHES.split())
LISTS = ("--spec",)  # a module and a function
NAMES = frozenset((*NUMBERS, *VALUES, *SWITCHES, *LISTS))


def check_model_shape(given: Mapping[str, Sequence[str]], checkpoint: str) -> None:
    """Raise ConfigError for every number that the checkpoint's config.json contradicts.

    A number that the file has in other words, or not at all, is not compared; neither is a checkpoint that is absent.
    """
    path = Path(checkpoint) / "config.json"
    if not path.is_file() or not any(name in NUMBERS for name in given):
        return
    raise_all(_contradictions(given, read_json_object(path), str(path)))


def _contradictions(given: Mapping[str, Sequence[str]], data: Mapping[str, object], path: str) -> Iterator[ConfigError]:
    inner = data.get("text_config")
    places = (data, inner) if isinstance(inner, dict) else (data,)
    for name, texts in given.items():
        found = [place[key] for key in NUMBERS.get(name, ()) for place in places if key in place]
        numbers = [value for value in found if isinstance(value, int | float)]
        try:
            ours = float(texts[0])
        except ValueError:  # a variable that the script left empty
            continue
        if numbers and not any(math.isclose(ours, value, rel_tol=1e-9) for value in numbers):
            remedy = "Take the flags of this model's shape, or leave them out: the file decides."
            yield ConfigError(name, f"must be {numbers[0]}, as {path} says", texts[0], remedy)
