"""A draft's writers name it and nest its config.json in ways of their own; here they become what SGLang reads.

Eagle3LlamaForCausalLM      AngelSlim's name of EAGLE-3, and vLLM's
LlamaForCausalLM, Qwen2 …   the authors of EAGLE name a draft as its target: its tensors say what it is
speculators_model_type      vLLM's speculators nest the block (slime_spec.checkpoints.speculators)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from slime_spec.checkpoints.families.eagle import ON_LLAMA, ON_QWEN2
from slime_spec.checkpoints.families.eagle3 import ARCHITECTURE, D2T
from slime_spec.checkpoints.families.llama import LLAMA
from slime_spec.checkpoints.families.qwen2 import QWEN2
from slime_spec.checkpoints.folder import architecture_of
from slime_spec.checkpoints.speculators import BLOCK_DRAFTERS, MODEL_TYPE, as_sglang, is_of_speculators
from slime_spec.errors import CheckpointError

PROJECTION = "fc.weight"  # which no whole model has
OTHER_NAMES = {"Eagle3LlamaForCausalLM": ARCHITECTURE}
AS_THEIR_TARGETS = {LLAMA.architecture: ON_LLAMA, QWEN2.architecture: ON_QWEN2}
CONVERT = "slime-spec draft convert --to sglang"


def read_uniformly(
    config: Mapping[str, Any], source: str, tensor_names: Collection[str] = (), copies_checked: bool = False
) -> Mapping[str, Any]:
    """Return the config.json that SGLang and this project read; the same object where it is one.

    ``tensor_names`` are those of the draft's checkpoint, as far as they are known. Block drafters of speculators have
    copies of the target's tables, which somebody must have compared (``copies_checked``); raises CheckpointError.
    """
    if is_of_speculators(config):
        if config.get(MODEL_TYPE) in BLOCK_DRAFTERS and not copies_checked:
            rule = "must be of EAGLE-3: block drafters of speculators have copies of the target's tables to compare"
            raise CheckpointError(f"{source}: {MODEL_TYPE}", rule, config[MODEL_TYPE], f"Convert it: {CONVERT}")
        return as_sglang(config, source)
    named = architecture_of(config)
    known = _known_name(named, {name.removeprefix("model.") for name in tensor_names})
    return config if known == named else {**config, "architectures": [known]}


def _known_name(named: str, tensor_names: Collection[str]) -> str:
    """Return the name that engines know a draft by."""
    if named in AS_THEIR_TARGETS and PROJECTION in tensor_names:
        is_eagle3 = D2T in tensor_names or any(name.startswith("midlayer.") for name in tensor_names)
        return ARCHITECTURE if is_eagle3 else AS_THEIR_TARGETS[named]
    return OTHER_NAMES.get(named, named)
