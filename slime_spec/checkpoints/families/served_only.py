"""SGLang alone serves these families, and finds their MTP layers without being given a path."""

from slime_spec.checkpoints.families.family import Family

SERVED_ONLY = Family(
    (
        *("BailingMoeForCausalLM", "BailingMoeV2ForCausalLM", "BailingMoeV2_5ForCausalLM"),
        *("MistralLarge3ForCausalLM", "PixtralForConditionalGeneration"),
        *("HYV3ForCausalLM", "HYV4ForCausalLM", "Qwen4ExpForConditionalGeneration"),
    ),
    sglang_finds_mtp=True,
)
