"""Where each family keeps its MTP layer and in which order its projection reads its two halves.

The order is a property of the weights: swapped halves load without complaint and draft nonsense.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

OTHER_ENGINE = "draft with it through the SGLang engine, or pass --sglang-speculative-algorithm LOOKUP"
NOT_EMBEDDED = f"which the embedded engine does not have; {OTHER_ENGINE}"
MLA_MOE = f"its MTP block has latent attention and experts, {NOT_EMBEDDED}"
GQA_MOE = f"its MTP block has a partial rotation and experts, {NOT_EMBEDDED}"
GATED_MOE = f"its MTP block has gated attention, a partial rotation and experts, {NOT_EMBEDDED}"


@dataclass(frozen=True)
class MtpFamily:
    """Names of one family's MTP layer, below ``prefix``; ``{layers}`` is the target's number of decoder layers.

    ``hidden_first`` says that the projection's columns are [hidden; embedding], else [embedding; hidden].
    ``block`` precedes the names of the decoder block (a Llama or Qwen2 block where the family is supported).
    ``unread`` are copies of the target's tensors. ``zero_first_embedding``: position 0 reads a zero embedding.
    ``gemma_norms``: norms multiply by 1 + weight. ``refused`` says why the embedded engine cannot draft with it.
    """

    prefix: str
    projection: str
    hidden_first: bool
    embedding_norm: str
    hidden_norm: str
    final_norm: str
    block: str = ""
    unread: tuple[str, ...] = ()
    zero_first_embedding: bool = False
    gemma_norms: bool = False
    refused: str = ""


MIMO = MtpFamily(
    prefix="model.mtp_layers.0.",
    projection="input_proj.weight",
    hidden_first=True,
    embedding_norm="token_layernorm.weight",
    hidden_norm="hidden_layernorm.weight",
    final_norm="final_layernorm.weight",
    zero_first_embedding=True,
)
DEEPSEEK = MtpFamily(
    prefix="model.layers.{layers}.",
    projection="eh_proj.weight",
    hidden_first=False,
    embedding_norm="enorm.weight",
    hidden_norm="hnorm.weight",
    final_norm="shared_head.norm.weight",
    unread=("embed_tokens.weight", "shared_head.head.weight"),
    refused=MLA_MOE,
)
GLM = replace(DEEPSEEK, refused=GQA_MOE)
QWEN3_NEXT = MtpFamily(
    prefix="mtp.",
    projection="fc.weight",
    hidden_first=False,
    embedding_norm="pre_fc_norm_embedding.weight",
    hidden_norm="pre_fc_norm_hidden.weight",
    final_norm="norm.weight",
    block="layers.0.",
    gemma_norms=True,
    refused=GATED_MOE,
)

# A draft of our own training for a target without an MTP layer: MiMo's format around a Llama block.
NEXTN_DRAFT = "LlamaForCausalLMNextN"

# config.json's architecture -> its MTP layer
MTP_FAMILIES = {
    "MiMoForCausalLM": MIMO,
    NEXTN_DRAFT: MIMO,
    "DeepseekV3ForCausalLM": DEEPSEEK,
    "Glm4MoeForCausalLM": GLM,
    "Qwen3NextForCausalLM": QWEN3_NEXT,
    "Qwen3_5ForCausalLM": QWEN3_NEXT,
    "Qwen3_5MoeForCausalLM": QWEN3_NEXT,
}
