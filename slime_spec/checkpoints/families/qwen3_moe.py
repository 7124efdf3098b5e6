"""Qwen3 with experts has Qwen3's attention, and a mixture of experts in place of the MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slime_spec.checkpoints.families.experts import SOFTMAX_KEYS, softmax_experts
from slime_spec.checkpoints.families.family import Family
from slime_spec.checkpoints.families.qwen3 import QWEN3


def _fields(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    return {"experts": softmax_experts(config, source)}


QWEN3_MOE = Family(
    ("Qwen3MoeForCausalLM",),
    model_type="qwen3_moe",
    is_built=True,
    is_trained=True,
    qk_norm=True,
    keys={**QWEN3.keys, **SOFTMAX_KEYS},
    defaults={"sliding_window": 4096, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    fields=_fields,
)
