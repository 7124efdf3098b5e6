"""Families of which one thing is known here: SGLang drafts with their own MTP layers without being given a path."""

from slime_spec.checkpoints.families.family import Family

SERVED_ONLY = Family(
    (
        *("BailingMoeForCausalLM", "BailingMoeV2ForCausalLM", "BailingMoeV2_5ForCausalLM"),
        *("MistralLarge3ForCausalLM", "PixtralForConditionalGeneration"),
        *("HYV3ForCausalLM", "HYV4ForCausalLM", "Qwen4ExpForConditionalGeneration"),
    ),
    sglang_finds_mtp=True,
)
