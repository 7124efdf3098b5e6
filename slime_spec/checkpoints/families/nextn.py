"""MTP layers serve as drafts: the target's own inside its checkpoint, or a layer in a folder of its own.

LlamaForCausalLMNextN        a layer that we train for a target without one, MiMo's around a Llama block
DeepseekV3ForCausalLMNextN,  the target's own layer alone, as layer 0, as lmsys publishes them for SGLang
Glm4MoeForCausalLMNextN
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slime_spec.checkpoints.config_keys import whole
from slime_spec.checkpoints.families.blocks import block_shapes
from slime_spec.checkpoints.families.deepseek import DEEPSEEK_V3
from slime_spec.checkpoints.families.dense import Shapes
from slime_spec.checkpoints.families.draft_format import ANOTHER_DRAFT, DraftFormat, DraftReading
from slime_spec.checkpoints.families.family import MtpLayer
from slime_spec.checkpoints.families.glm4_moe import GLM4_MOE
from slime_spec.checkpoints.families.llama import LLAMA
from slime_spec.checkpoints.families.mimo import MIMO_LAYER
from slime_spec.errors import CheckpointError, NotComputedError

if TYPE_CHECKING:
    from slime_spec.checkpoints.draft_spec import DraftSpec

OTHERWISE = "or draft with a head of its own, or from texts"
ARCHITECTURE = "LlamaForCausalLMNextN"
OWN_LAYER = MIMO_LAYER
# The decoders whose own layer comes in such folders.
ALONE = {"DeepseekV3ForCausalLMNextN": DEEPSEEK_V3, "Glm4MoeForCausalLMNextN": GLM4_MOE}
OF_THE_LAST = {"first_k_dense_replace": 0, "mlp_only_layers": []}  # where the target has experts, so has the layer


def _block_config(config: Mapping[str, Any], layer: MtpLayer | None, source: str) -> Mapping[str, Any]:
    if layer is not None and layer.refused:
        raise CheckpointError(f"{source}: architectures", layer.refused, config["architectures"][0], ANOTHER_DRAFT)
    if not config.get("num_nextn_predict_layers"):
        raise CheckpointError(
            f"{source}: num_nextn_predict_layers",
            "must be at least 1: this checkpoint has no MTP layer",
            config.get("num_nextn_predict_layers"),
            ANOTHER_DRAFT,
        )
    if config["num_nextn_predict_layers"] > 1:
        raise NotComputedError(
            f"{source}: num_nextn_predict_layers",
            "must be 1: of several layers, each of which predicts a token further, none is computed here",
            config["num_nextn_predict_layers"],
            f"Set it to 1, so that the first layer drafts every token, {OTHERWISE}.",
        )
    return {**config, "num_hidden_layers": 1, **OF_THE_LAST}


def _fields(read: DraftReading) -> dict[str, Any]:
    layer = read.layer or _layer_in_folder(read.config["architectures"][0])
    return {
        "target_hidden_size": read.block.hidden_size,
        "draft_vocab_size": read.block.vocab_size,
        "hidden_first": layer.hidden_first,
        "recurrent_norm": True,
        "zero_first_embedding": layer.zero_first_embedding,
        "num_target_layers": read.target.num_layers if read.layer is not None else 0,
        "in_target": read.layer is not None,
    }


def _layer_in_folder(architecture: str) -> MtpLayer:
    family = ALONE.get(architecture)
    return OWN_LAYER if family is None or family.mtp is None else family.mtp


def _shapes(spec: DraftSpec) -> Shapes:
    layer, hidden = spec.mtp_layer, spec.block.hidden_size
    prefix, block = layer.prefix, layer.prefix + layer.block
    return {
        prefix + layer.projection: (hidden, 2 * hidden),
        prefix + layer.embedding_norm: (hidden,),
        prefix + layer.hidden_norm: (hidden,),
        block + "input_layernorm.weight": (hidden,),
        **block_shapes(block, spec.block, hidden),
        prefix + layer.final_norm: (hidden,),
    }


def _config(spec: DraftSpec) -> dict[str, Any]:
    return {"architectures": [ARCHITECTURE], "num_nextn_predict_layers": 1}


def _is_unread(name: str, spec: DraftSpec) -> bool:
    """Return whether the tensor is a copy of the target's embedding or head."""
    layer = spec.mtp_layer
    return name.removeprefix(layer.prefix) in ("embed_tokens.weight", "lm_head.weight", *layer.copies)


NEXTN = DraftFormat(
    family="mtp",
    blocks={ARCHITECTURE: LLAMA.architecture, **{name: family.architecture for name, family in ALONE.items()}},
    block_config=_block_config,
    fields=_fields,
    shapes=_shapes,
    config=_config,
    is_unread=_is_unread,
    drops_model_prefix=False,
    keys={"num_nextn_predict_layers": whole(0)},
)
