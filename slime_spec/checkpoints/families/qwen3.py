"""Qwen3 has Llama's decoder with a norm of each head's queries and keys."""

from slime_spec.checkpoints.families.family import Family

QWEN3 = Family(("Qwen3ForCausalLM",), model_type="qwen3", is_built=True, qk_norm=True)
