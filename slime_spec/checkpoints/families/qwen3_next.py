"""Qwen3-Next and Qwen3.5 have gated attention beside linear attention, experts, an MTP layer with weights of 1 + w."""

from slime_spec.checkpoints.families.family import NOT_EMBEDDED, Family, MtpLayer

QWEN3_NEXT = Family(
    ("Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"),
    model_type="qwen3_next",
    mtp=MtpLayer(
        prefix="mtp.",
        projection="fc.weight",
        hidden_first=False,
        embedding_norm="pre_fc_norm_embedding.weight",
        hidden_norm="pre_fc_norm_hidden.weight",
        final_norm="norm.weight",
        block="layers.0.",
        refused=f"its MTP block has gated attention, a partial rotation and experts, {NOT_EMBEDDED}",
    ),
)
