"""DeepSeek-V3 and R1 have latent attention, experts, and MTP layers stored behind the decoder's last layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slime_spec.checkpoints.families.dense import DENSE_KEYS
from slime_spec.checkpoints.families.experts import SIGMOID_KEYS, sigmoid_experts
from slime_spec.checkpoints.families.family import BEHIND_THE_LAST, Family
from slime_spec.checkpoints.families.latent import LATENT_KEYS, latent_attention


def _fields(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    latent = latent_attention(config, source)
    return {
        "experts": sigmoid_experts(config, source),
        "latent": latent,
        "num_kv_heads": config["num_attention_heads"],
        "head_dim": latent.key_dim,
        "rotary_columns": latent.rope_dim,
    }


DEEPSEEK_V3 = Family(
    ("DeepseekV3ForCausalLM",),
    model_type="deepseek_v3",
    is_built=True,
    is_trained=True,
    keys={**DENSE_KEYS, **SIGMOID_KEYS, **LATENT_KEYS},
    defaults={
        **{
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
        **{"n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048},
        **{"n_group": 8, "topk_group": 4, "first_k_dense_replace": 3, "routed_scaling_factor": 2.5},
    },
    fields=_fields,
    rope_kinds=("default", "yarn"),
    mtp=BEHIND_THE_LAST,
    sglang_finds_mtp=True,
)
# Of these only SGLang's treatment is known here.
NEWER_DEEPSEEK = Family(("DeepseekV32ForCausalLM", "DeepseekV4ForCausalLM"), sglang_finds_mtp=True)
