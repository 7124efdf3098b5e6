"""Qwen3 has Llama's decoder with a norm of each head's queries and keys."""

from slime_spec.checkpoints.config_keys import only
from slime_spec.checkpoints.families.dense import DENSE_KEYS, WINDOW_DEFAULTS, WINDOW_KEYS
from slime_spec.checkpoints.families.family import Family

QWEN3 = Family(
    ("Qwen3ForCausalLM",),
    model_type="qwen3",
    is_built=True,
    is_trained=True,
    qk_norm=True,
    keys={**DENSE_KEYS, **WINDOW_KEYS, "use_qk_norm": only(True)},
    defaults={**WINDOW_DEFAULTS, "head_dim": 128},
)
