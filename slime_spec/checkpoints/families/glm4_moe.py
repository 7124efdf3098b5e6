"""GLM-4.5 and 4.6 have grouped-query attention with partial rotation, experts, and DeepSeek's layout of MTP layers."""

from slime_spec.checkpoints.families.family import NOT_EMBEDDED, Family, layer_behind_the_last

GLM4_MOE = Family(
    ("Glm4MoeForCausalLM",),
    model_type="glm4_moe",
    mtp=layer_behind_the_last(f"its MTP block has a partial rotation and experts, {NOT_EMBEDDED}"),
    sglang_finds_mtp=True,
)
# Of these only SGLang's treatment is known here.
OTHER_GLM = Family(("Glm4MoeLiteForCausalLM", "GlmMoeDsaForCausalLM"), sglang_finds_mtp=True)
