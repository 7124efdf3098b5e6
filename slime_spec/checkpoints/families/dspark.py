"""DSpark (arXiv 2607.05147) is DFlash whose drafts know the token before: a low-rank bias of the logits by that token.

The layout is SpecForge's and SGLang's ``DSparkDraftModel``; DeepSpec, where its authors train, calls it
``Qwen3DSparkModel``. The bias is of the token before alone, gated by the block's state, or recurrent
(slime_spec.draft.markov). A block of n masks and root drafts n tokens, the first from the root's own row, or from the
masks alone (``sample_from_anchor`` false). The head that predicts acceptance is left aside: it changes no token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slime_spec.checkpoints.config_keys import Keys, check_keys, entries, flag, harmless, only, whole
from slime_spec.checkpoints.families.dense import Shapes
from slime_spec.checkpoints.families.dflash import (
    FROM_ROOT,
    MASK,
    NAME_IT,
    NESTED,
    OTHER_HEAD,
    SHARED_KEYS,
    block_config,
    block_fields,
    block_size_of,
    layer_config,
    layer_shapes,
    nested_of,
    num_captured,
)
from slime_spec.checkpoints.families.dflash import KEYS as DFLASH_KEYS
from slime_spec.checkpoints.families.dflash import num_own_parameters as num_layer_parameters
from slime_spec.checkpoints.families.draft_format import DraftFormat, DraftReading
from slime_spec.checkpoints.families.qwen3 import QWEN3
from slime_spec.errors import CheckpointError

if TYPE_CHECKING:
    from slime_spec.checkpoints.draft_spec import DraftSpec

ARCHITECTURE, OF_DEEPSPEC = "DSparkDraftModel", "Qwen3DSparkModel"
OWN, RANK, KIND = "dspark_config", "markov_rank", "markov_head_type"
MARKOV_KINDS = VANILLA, GATED, RNN = "vanilla", "gated", "rnn"
PREVIOUS, BIAS = "markov_head.markov_w1.weight", "markov_head.markov_w2.weight"
MIXES = {GATED: "markov_head.gate_proj", RNN: "markov_head.joint_proj"}  # the projection of each kind that has one
MARKOV_KEYS: Keys = {
    RANK: whole(1, 2**14),
    KIND: only(*MARKOV_KINDS, why=OTHER_HEAD),
    FROM_ROOT: flag(),
    **dict.fromkeys(
        ("enable_confidence_head", "confidence_head_with_markov", "confidence_head_alpha"),
        harmless("the head that predicts acceptance changes no token, and is left aside"),
    ),
}
KEYS: Keys = {**DFLASH_KEYS, **MARKOV_KEYS, OWN: entries()}
NESTED_KEYS: Keys = {
    **SHARED_KEYS,
    **MARKOV_KEYS,
    "projector_type": only("dspark", why=OTHER_HEAD),
    "attention_mode": only("gqa", "mha", why=OTHER_HEAD),
}


def _fields(read: DraftReading) -> dict[str, Any]:
    nested, own = nested_of(read.config), read.config.get(OWN) or {}
    check_keys(nested, NESTED_KEYS, read.source, f"{NESTED}.")
    check_keys(own, MARKOV_KEYS, read.source, f"{OWN}.")

    def named(name: str) -> Any:
        return next((each[name] for each in (own, nested, read.config) if each.get(name) is not None), None)

    rank = named(RANK)
    if rank is None:
        raise CheckpointError(
            f"{read.source}: {RANK}", "must be given: drafts know the token before by it", None, NAME_IT
        )
    from_root = named(FROM_ROOT) is not False
    # SGLang reads the mask in this order.
    mask = next((each[MASK] for each in (own, read.config, nested) if each.get(MASK) is not None), None)
    fields = block_fields(read, {**nested, MASK: mask})
    size = fields["block_size"] if from_root else fields["block_size"] + 1
    kind = named(KIND) or VANILLA
    return {**fields, "block_size": size, "drafts_from_root": from_root, "markov_rank": rank, "markov_kind": kind}


def _shapes(spec: DraftSpec) -> Shapes:
    table = (spec.block.vocab_size, spec.markov_rank)
    shapes = {**layer_shapes(spec), PREVIOUS: table, BIAS: table}
    if spec.markov_kind in MIXES:
        rows, columns = _mix_shape(spec.markov_kind, spec.markov_rank, spec.block.hidden_size)
        name = MIXES[spec.markov_kind]
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    return shapes


def _mix_shape(kind: str, rank: int, hidden_size: int) -> tuple[int, int]:
    return (rank, hidden_size + rank) if kind == GATED else (3 * rank, hidden_size + 2 * rank)


def _config(spec: DraftSpec) -> dict[str, Any]:
    # SpecForge reads the nested object, SGLang the config.json's own keys.
    markov = {RANK: spec.markov_rank, KIND: spec.markov_kind, FROM_ROOT: spec.drafts_from_root}
    attention = "mha" if spec.block.num_heads == spec.block.num_kv_heads else "gqa"
    more = {**markov, "projector_type": "dspark", "attention_mode": attention, "enable_confidence_head": False}
    return {
        "architectures": [ARCHITECTURE],
        **layer_config(spec, spec.num_block_drafts, more),
        **markov,
        "enable_confidence_head": False,
    }


def _is_unread(name: str, spec: DraftSpec) -> bool:
    return name == "lm_head.weight" or name.startswith("confidence_head.")


def _num_own_parameters(config: Mapping[str, Any]) -> int:
    places = (config.get(OWN), config.get(NESTED), config)
    named = [each for each in places if isinstance(each, Mapping)]
    rank = next((each[RANK] for each in named if type(each.get(RANK)) is int), 0)
    kind = next((each[KIND] for each in named if each.get(KIND) in MIXES), VANILLA)
    rows, columns = _mix_shape(kind, rank, config["hidden_size"]) if kind in MIXES else (0, 0)
    return int(num_layer_parameters(config) + 2 * rank * config["vocab_size"] + rows * (columns + 1))


DSPARK = DraftFormat(
    family="dspark",
    blocks={ARCHITECTURE: QWEN3.architecture, OF_DEEPSPEC: QWEN3.architecture},
    block_config=block_config,
    fields=_fields,
    shapes=_shapes,
    config=_config,
    is_unread=_is_unread,
    renamed={"logit_head.": ""},  # where early files have the heads
    num_own_parameters=_num_own_parameters,
    num_block_drafts=block_size_of,  # its config.json counts the drafts alone
    num_captured=num_captured,
    keys=KEYS,
    nested_keys={NESTED: NESTED_KEYS, OWN: {**MARKOV_KEYS, MASK: whole(0)}},
)
