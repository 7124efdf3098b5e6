"""GLM-4.5 and 4.6 have grouped-query attention with partial rotation, experts, and DeepSeek's layout of MTP layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slime_spec.checkpoints.config_keys import flag, only
from slime_spec.checkpoints.families.dense import DENSE_KEYS
from slime_spec.checkpoints.families.experts import SIGMOID_KEYS, sigmoid_experts
from slime_spec.checkpoints.families.family import BEHIND_THE_LAST, Family

ROTARY_SHARE = 0.5  # of each head's columns


def _fields(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    return {
        "experts": sigmoid_experts(config, source),
        "qkv_bias": bool(config.get("attention_bias")),
        "qk_norm": bool(config.get("use_qk_norm")),
    }


GLM4_MOE = Family(
    ("Glm4MoeForCausalLM",),
    model_type="glm4_moe",
    is_built=True,
    is_trained=True,
    keys={
        **{**DENSE_KEYS, **SIGMOID_KEYS, "attention_bias": flag(), "use_qk_norm": flag()},
        **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), only(ROTARY_SHARE)),
    },
    defaults={
        **{"n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 1408},
        **{"first_k_dense_replace": 1, "num_key_value_heads": 8},
    },
    fields=_fields,
    rotary_share=ROTARY_SHARE,
    mtp=BEHIND_THE_LAST,
    sglang_finds_mtp=True,
)
# Of these only SGLang's treatment is known here.
OTHER_GLM = Family(("Glm4MoeLiteForCausalLM", "GlmMoeDsaForCausalLM"), sglang_finds_mtp=True)
