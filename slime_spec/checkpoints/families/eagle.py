"""EAGLE (arXiv 2401.15077) has a projection of [embedding, hidden state], then Llama or Qwen2 blocks; no own head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slime_spec.checkpoints.config_keys import flag
from slime_spec.checkpoints.families.blocks import block_shapes
from slime_spec.checkpoints.families.dense import Shapes
from slime_spec.checkpoints.families.draft_format import DraftFormat, DraftReading
from slime_spec.checkpoints.families.llama import LLAMA
from slime_spec.checkpoints.families.qwen2 import QWEN2

if TYPE_CHECKING:
    from slime_spec.checkpoints.draft_spec import DraftSpec

ON_LLAMA, ON_QWEN2 = "LlamaForCausalLMEagle", "Qwen2ForCausalLMEagle"


def _fields(read: DraftReading) -> dict[str, Any]:
    return {
        "target_hidden_size": read.block.hidden_size,
        "draft_vocab_size": read.block.vocab_size,
        "fc_bias": bool(read.config.get("bias", True)),
        "logits_norm": False,
    }


def _shapes(spec: DraftSpec) -> Shapes:
    hidden = spec.block.hidden_size
    shapes: Shapes = {"fc.weight": (hidden, 2 * hidden)}
    if spec.fc_bias:
        shapes["fc.bias"] = (hidden,)
    for layer in range(spec.block.num_layers):
        prefix = f"layers.{layer}."
        if layer > 0:
            shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes |= block_shapes(prefix, spec.block, hidden)
    return shapes


def _config(spec: DraftSpec) -> dict[str, Any]:
    is_qwen2 = spec.block.qkv_bias and not spec.block.out_bias
    return {"architectures": [ON_QWEN2 if is_qwen2 else ON_LLAMA], "bias": spec.fc_bias}


def _is_unread(name: str, spec: DraftSpec) -> bool:
    return name == "lm_head.weight"


def _num_own_parameters(config: Mapping[str, Any]) -> int:
    return int(2 * config["hidden_size"] ** 2)


EAGLE = DraftFormat(
    family="eagle",
    blocks={ON_LLAMA: LLAMA.architecture, ON_QWEN2: QWEN2.architecture},
    served=("MistralForCausalLMEagle",),
    fields=_fields,
    shapes=_shapes,
    config=_config,
    is_unread=_is_unread,
    optional=frozenset({"fc.bias"}),  # many files lack it although it should be there
    num_own_parameters=_num_own_parameters,
    keys={"bias": flag()},
)
