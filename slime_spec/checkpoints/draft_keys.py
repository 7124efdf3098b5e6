"""Says which keys of a draft's config.json nobody here knows: whether they change its numbers is not known either."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slime_spec.checkpoints.config_keys import Keys, harmless
from slime_spec.checkpoints.families import FORMAT_OF, family_of
from slime_spec.checkpoints.families.dense import WINDOW_KEYS
from slime_spec.checkpoints.families.draft_format import DRAFT_KEYS
from slime_spec.checkpoints.folder import architecture_of
from slime_spec.checkpoints.rope_settings import ROPE_KEYS

# Keys of drafts that are published, and that no network of a draft reads.
OF_TRAINING = harmless("of the training that made the draft")
OF_THE_TARGET = harmless("of the target whose config.json was copied")
OF_WRITERS: Keys = {
    **dict.fromkeys(("num_anchors", "embed_requires_grad", "hidden_dropout", "loss_decay_gamma"), OF_TRAINING),
    **dict.fromkeys(("target_model_type", "modal_type", "model_max_length", "max_length"), OF_THE_TARGET),
    **dict.fromkeys(("image_token_id", "video_token_id", "vision_token_id"), OF_THE_TARGET),
    **dict.fromkeys(("vision_start_token_id", "vision_end_token_id", "decoder_sparse_step"), OF_THE_TARGET),
    **dict.fromkeys(("model_type", "auto_map", "_name_or_path", "name_or_path"), harmless("names")),
    "sliding_window_non_causal": harmless("of layers with windows, which are refused"),
    "mask_token": harmless("its id is what is read"),
    "qkv_bias": harmless("a Qwen2 block has the biases, another that has them has tensors too many"),
}


def unknown_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys, nested ones as ``outer.inner``, that no table names; none of a draft of an unknown format.

    MTP layers have the config.json of their target, whose other keys are no concern of the layer's.
    """
    architecture = architecture_of(config)
    draft_format = FORMAT_OF.get(architecture)
    if draft_format is None or draft_format.family == "mtp":
        return ()
    block = family_of(draft_format.blocks[architecture]).keys
    known = {**OF_WRITERS, **DRAFT_KEYS, **ROPE_KEYS, **WINDOW_KEYS, **block, **draft_format.keys}
    found = [name for name, value in config.items() if name not in known and value is not None]
    for outer, keys in draft_format.nested_keys.items():
        nested = config.get(outer)
        if isinstance(nested, dict):
            found += [f"{outer}.{name}" for name, value in nested.items() if name not in keys and value is not None]
    return tuple(found)
