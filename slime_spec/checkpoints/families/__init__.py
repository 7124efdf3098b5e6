"""The table of model families and draft formats maps config.json's architecture to the record that describes it."""

from __future__ import annotations

from collections.abc import Mapping

from slime_spec.checkpoints.families.deepseek import DEEPSEEK_V3, NEWER_DEEPSEEK
from slime_spec.checkpoints.families.dflash import DFLASH
from slime_spec.checkpoints.families.draft_format import DraftFamily, DraftFormat
from slime_spec.checkpoints.families.dspark import DSPARK
from slime_spec.checkpoints.families.eagle import EAGLE
from slime_spec.checkpoints.families.eagle3 import EAGLE3
from slime_spec.checkpoints.families.family import Family
from slime_spec.checkpoints.families.glm4_moe import GLM4_MOE, OTHER_GLM
from slime_spec.checkpoints.families.llama import LLAMA
from slime_spec.checkpoints.families.mimo import MIMO
from slime_spec.checkpoints.families.nextn import NEXTN
from slime_spec.checkpoints.families.qwen2 import QWEN2
from slime_spec.checkpoints.families.qwen3 import QWEN3
from slime_spec.checkpoints.families.qwen3_moe import QWEN3_MOE
from slime_spec.checkpoints.families.qwen3_next import QWEN3_NEXT
from slime_spec.checkpoints.families.served_only import SERVED_ONLY

FAMILIES = (
    *(LLAMA, QWEN2, QWEN3, MIMO),
    *(DEEPSEEK_V3, NEWER_DEEPSEEK, GLM4_MOE, OTHER_GLM, QWEN3_MOE, QWEN3_NEXT, SERVED_ONLY),
)
FORMATS = (EAGLE3, EAGLE, NEXTN, DFLASH, DSPARK)
UNKNOWN = Family(())

BY_ARCHITECTURE: Mapping[str, Family] = {name: family for family in FAMILIES for name in family.architectures}
BUILT_ARCHITECTURES = tuple(name for name, family in BY_ARCHITECTURE.items() if family.is_built)
TRAINED_ARCHITECTURES = tuple(name for name, family in BY_ARCHITECTURE.items() if family.is_trained)
# What a draft's config.json may name: a format's own names, and a target whose own MTP layer drafts.
FORMAT_OF: Mapping[str, DraftFormat] = {
    **{name: draft_format for draft_format in FORMATS for name in draft_format.blocks},
    **{name: NEXTN for name, family in BY_ARCHITECTURE.items() if family.mtp is not None},
}


def family_of(architecture: str) -> Family:
    """Return the family of config.json's ``architecture``; a family without properties for an unknown architecture."""
    return BY_ARCHITECTURE.get(architecture, UNKNOWN)


def format_of_family(family: DraftFamily) -> DraftFormat:
    """Return the format that a DraftSpec's ``family`` names."""
    return next(each for each in FORMATS if each.family == family)


def head_format(architecture: str) -> DraftFormat | None:
    """Return the format of a draft in a folder of its own, those included that SGLang alone reads.

    None for whole models.
    """
    return next((each for each in FORMATS if architecture in (*each.blocks, *each.served)), None)


def model_type_comes_as_code(model_type: str) -> bool:
    """Return whether transformers lacks the configuration class of ``model_type``, as far as the families here say."""
    return any(family.comes_as_code and family.model_type == model_type for family in FAMILIES)
