"""Qwen2 and Qwen2.5 have Llama's decoder with biases of queries, keys and values."""

from slime_spec.checkpoints.config_keys import harmless
from slime_spec.checkpoints.families.dense import DENSE_KEYS, WINDOW_DEFAULTS, WINDOW_KEYS
from slime_spec.checkpoints.families.family import Family

QWEN2 = Family(
    ("Qwen2ForCausalLM",),
    model_type="qwen2",
    is_built=True,
    is_trained=True,
    qkv_bias=True,
    keys={
        **DENSE_KEYS,
        **WINDOW_KEYS,
        "attention_bias": harmless("q, k and v have biases always"),
    },
    defaults=WINDOW_DEFAULTS,
    overflows_float16=True,
)
