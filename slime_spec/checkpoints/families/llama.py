"""This family is Llama 2 and 3, and the models that use their decoder under its name (SmolLM2)."""

from slime_spec.checkpoints.families.dense import DENSE_KEYS
from slime_spec.checkpoints.families.family import Family

LLAMA = Family(("LlamaForCausalLM",), model_type="llama", is_built=True, is_trained=True, keys=DENSE_KEYS)
