"""The drafts that ship with the package, by name: ``builtin:NAME``."""

from __future__ import annotations

from pathlib import Path

from slime_spec.interfaces import unknown_choice

BUILTIN = "builtin:"


def builtin_folder(path: str) -> Path:
    """The folder of ``builtin:NAME``; raises ConfigError listing the drafts that there are."""
    folders = Path(__file__).parent / "builtin"
    known = [f"{BUILTIN}{folder.parent.name}" for folder in folders.glob("*/config.json")]
    if path not in known:
        raise unknown_choice("speculative.draft_model_path", known, path)
    return folders / path.removeprefix(BUILTIN)
