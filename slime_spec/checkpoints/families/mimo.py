"""MiMo has Qwen2's decoder, and an MTP layer around a Qwen2 block."""

from slime_spec.checkpoints.config_keys import whole
from slime_spec.checkpoints.families.family import Family, MtpLayer
from slime_spec.checkpoints.families.qwen2 import QWEN2

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
    base_model_type="qwen2",
    is_built=True,
    is_trained=True,
    qkv_bias=True,
    keys={
        **QWEN2.keys,
        "num_nextn_predict_layers": whole(0),
    },
    defaults=QWEN2.defaults,
    mtp=MIMO_LAYER,
    comes_as_code=True,
)
