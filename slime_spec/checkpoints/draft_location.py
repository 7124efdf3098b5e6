"""A run's draft is nowhere, inside the target's checkpoint, or in a folder, perhaps of this package."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slime_spec.checkpoints.folder import DRAFT_PATH
from slime_spec.config.tree import SpeculativeConfig
from slime_spec.interfaces import unknown_choice

BUILTIN = "builtin:"


@dataclass(frozen=True)
class DraftLocation:
    """Says where a draft is, and its kind: an MTP layer of the target, a head over its features, or a whole model.

    Example: ``DraftLocation("head", "/drafts/eagle3")``
    """

    kind: Literal["in_target", "head", "whole"]
    folder: str


def locate_draft(speculative: SpeculativeConfig, target: str) -> DraftLocation | None:
    """Return the draft of a run whose target is in ``target``; None where no weights draft or no folder is named.

    ``in_target`` says what the settings ask for, not that the target has an MTP layer.
    Raises ConfigError for a builtin draft that does not exist; no other file is looked at.
    """
    algorithm, path = speculative.record, speculative.draft_model_path
    if not algorithm.has_weights:
        return None
    if path is None:
        return DraftLocation("in_target", target) if algorithm.drafts_with_mtp_layer else None
    folder = builtin_folder(path) if path.startswith(BUILTIN) else path
    if algorithm.is_whole_model:
        return DraftLocation("whole", folder)
    is_targets = os.path.realpath(folder) == os.path.realpath(target)
    return DraftLocation("in_target" if is_targets else "head", folder)


def builtin_folder(path: str) -> str:
    """Return the folder of a draft that ships with the package.

    Raises ConfigError listing the drafts that there are.
    """
    folders = Path(__file__).parent / "builtin"
    known = [f"{BUILTIN}{folder.parent.name}" for folder in folders.glob("*/config.json")]
    if path not in known:
        raise unknown_choice(DRAFT_PATH, known, path)
    return str(folders / path.removeprefix(BUILTIN))
