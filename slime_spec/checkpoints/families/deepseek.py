"""DeepSeek-V3 and R1 have latent attention, experts, and MTP layers stored behind the decoder's last layer."""

from slime_spec.checkpoints.families.family import NOT_EMBEDDED, Family, layer_behind_the_last

DEEPSEEK_V3 = Family(
    ("DeepseekV3ForCausalLM",),
    model_type="deepseek_v3",
    mtp=layer_behind_the_last(f"its MTP block has latent attention and experts, {NOT_EMBEDDED}"),
    sglang_finds_mtp=True,
)
# Of these only SGLang's treatment is known here.
NEWER_DEEPSEEK = Family(("DeepseekV32ForCausalLM", "DeepseekV4ForCausalLM"), sglang_finds_mtp=True)
