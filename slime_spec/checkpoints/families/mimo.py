"""MiMo has Qwen2's decoder, and an MTP layer around a Qwen2 block."""

from slime_spec.checkpoints.families.family import Family, MtpLayer

MIMO_LAYER = MtpLayer(
    prefix="model.mtp_layers.0.",
    projection="input_proj.weight",
    hidden_first=True,
    embedding_norm="token_layernorm.weight",
    hidden_norm="hidden_layernorm.weight",
    final_norm="final_layernorm.weight",
    zero_first_embedding=True,
)
MIMO = Family(
    ("MiMoForCausalLM",),
    model_type="mimo",
    is_built=True,
    qkv_bias=True,
    refused_biases=("mlp_bias",),  # its config.json says with attention_bias that q, k and v have biases
    mtp=MIMO_LAYER,
    comes_as_code=True,
)
