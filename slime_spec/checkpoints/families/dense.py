"""Llama, Qwen2, Qwen3, MiMo and their drafts share this dense decoder: keys of config.json, tensor names, shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slime_spec.checkpoints.config_keys import (
    ANOTHER,
    CORRECT,
    Keys,
    entries,
    flag,
    harmless,
    listed,
    only,
    real,
    shown,
    text,
    whole,
)
from slime_spec.checkpoints.rope_settings import ROPE_KEYS
from slime_spec.errors import CheckpointError, NotComputedError

if TYPE_CHECKING:
    from slime_spec.checkpoints.model_spec import ModelSpec

Shapes = dict[str, tuple[int, ...]]

OTHER_DECODER = "a decoder of another kind has it"
# Every key that transformers acts on in a decoder of these families, and keys by which other families change one.
DENSE_KEYS: Keys = {
    "num_hidden_layers": whole(1, 4096),
    "hidden_size": whole(1, 2**17),
    "intermediate_size": whole(1, 2**20),
    "num_attention_heads": whole(1, 2**12),
    "num_key_value_heads": whole(1, 2**12),
    "head_dim": whole(2, 2**12),
    "vocab_size": whole(1, 2**24),
    "max_position_embeddings": whole(),
    "rms_norm_eps": real(1e-20, 1),
    "tie_word_embeddings": flag(),
    **ROPE_KEYS,
    "hidden_act": only("silu", "swish"),
    "hidden_activation": only("silu", "swish"),
    "attention_bias": only(False),
    "mlp_bias": only(False),
    "attention_dropout": only(0, why="the trainer drops nothing"),
    "is_causal": only(True),
    "sliding_window": whole(0),
    "layer_types": listed(text()),
    "quantization_config": entries(),  # which of them are computed: quantization.py
    "compression_config": only(why="SGLang computes with quantised weights, in rollouts alone"),
    **dict.fromkeys(("attention_chunk_size", "num_kv_shared_layers", "clip_qkv"), only(why=OTHER_DECODER)),
    **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar", "scale_depth"), only(why=OTHER_DECODER)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), only(why=OTHER_DECODER)),
    **dict.fromkeys(("no_rope_layers", "dim_model_base", "kv_lora_rank"), only(why=OTHER_DECODER)),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), only(0, why=OTHER_DECODER)),
    **dict.fromkeys(("logit_scale", "logits_scaling", "residual_multiplier"), only(1, why=OTHER_DECODER)),
    **dict.fromkeys(("embedding_multiplier", "scale_emb"), only(1, why=OTHER_DECODER)),
    **dict.fromkeys(("qk_layernorm", "use_qk_norm"), only(False, why=OTHER_DECODER)),
    "pretraining_tp": harmless("older versions add a product up in so many parts: the same sum"),
    "initializer_range": harmless("weights are loaded, not drawn"),
    "pad_token_id": harmless("nothing is padded"),
    "bos_token_id": harmless("the tokenizer adds it"),
    "eos_token_id": harmless("ends replies, together with those of two more files: end_of_text.py"),
    "dtype": harmless("the settings engine.dtype and trainer.dtype say what is computed in"),
    "torch_dtype": harmless("as dtype"),
    "chunk_size_feed_forward": harmless("these decoders do not read it"),
    "is_encoder_decoder": harmless("these decoders do not read it"),
    **dict.fromkeys(("use_cache", "return_dict", "output_hidden_states"), harmless("about what a call returns")),
    **dict.fromkeys(("id2label", "label2id", "num_labels", "problem_type"), harmless("for classifiers")),
    **dict.fromkeys(("transformers_version", "architectures"), harmless("say who wrote the file, and the family")),
}
# What Qwen2's and Qwen3's classes read beyond.
WINDOW_KEYS: Keys = {"use_sliding_window": flag(), "max_window_layers": whole(0)}
# What those classes take for a key that a config.json leaves out.
WINDOW_DEFAULTS: Mapping[str, Any] = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}


def check_decoder(config: Mapping[str, Any], keys: Keys, source: str) -> None:
    """Raise CheckpointError for keys of config.json that contradict each other, or limit which tokens a layer sees."""
    if config.get("kv_lora_rank") is None:
        _check_heads(config, source)
    if key := _key_of_short_windows(config, keys):
        rule = f"must let every layer attend to the whole context of {config['max_position_embeddings']} tokens"
        raise NotComputedError(f"{source}: {key}", rule, shown(config.get(key)), ANOTHER)


def _check_heads(config: Mapping[str, Any], source: str) -> None:
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    if kv_heads is not None and heads % kv_heads:
        raise CheckpointError(
            f"{source}: num_key_value_heads", f"must divide num_attention_heads ({heads})", kv_heads, CORRECT
        )
    dim = config.get("head_dim")
    if dim is None and config["hidden_size"] % heads:
        rule = f"must be a multiple of num_attention_heads ({heads}) where head_dim is left out"
        raise CheckpointError(f"{source}: hidden_size", rule, config["hidden_size"], CORRECT)
    if (dim or config["hidden_size"] // heads) % 2:
        raise CheckpointError(f"{source}: head_dim", "must be even: its halves are rotated", dim, CORRECT)


def _key_of_short_windows(config: Mapping[str, Any], keys: Keys) -> str:
    """Return the key by which layers see a window of the context alone, "" where all see the whole context."""
    layers, window, first = config["num_hidden_layers"], config.get("sliding_window"), config.get("max_window_layers")
    switched = "use_sliding_window" in keys
    # Drafts with Llama's block keep the keys of a Qwen config, where false says that no layer has a window.
    is_off = not config.get("use_sliding_window") if switched else config.get("use_sliding_window") is False
    if is_off or (switched and first is not None and first >= layers):
        window = None
    is_short = window is not None and window < config["max_position_embeddings"]
    if types := config.get("layer_types"):
        harmless_types = {"full_attention"} if is_short or window is None else {"full_attention", "sliding_attention"}
        return "" if set(types) <= harmless_types else "layer_types"
    return ("use_sliding_window" if switched else "sliding_window") if is_short else ""


def grouped_attention_shapes(prefix: str, spec: ModelSpec, input_size: int) -> Shapes:
    """Return the shapes of a layer's grouped-query attention over ``input_size`` columns."""
    dim = spec.head_dim
    rows = {"q": spec.num_heads * dim, "k": spec.num_kv_heads * dim, "v": spec.num_kv_heads * dim}
    shapes: Shapes = {f"{prefix}self_attn.{x}_proj.weight": (n, input_size) for x, n in rows.items()}
    if spec.qkv_bias:
        shapes |= {f"{prefix}self_attn.{x}_proj.bias": (n,) for x, n in rows.items()}
    if spec.qk_norm:
        shapes |= {f"{prefix}self_attn.{x}_norm.weight": (dim,) for x in "qk"}
    shapes[prefix + "self_attn.o_proj.weight"] = (spec.hidden_size, rows["q"])
    if spec.out_bias:
        shapes[prefix + "self_attn.o_proj.bias"] = (spec.hidden_size,)
    return shapes
