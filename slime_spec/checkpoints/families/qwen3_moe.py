"""Qwen3 with experts has Qwen3's attention, and a mixture of experts in place of the MLP."""

from slime_spec.checkpoints.families.family import Family

QWEN3_MOE = Family(("Qwen3MoeForCausalLM",), model_type="qwen3_moe", qk_norm=True)
