"""This module finds the newest whole checkpoint in a run's folder, and moves a finished checkpoint into the folder.

checkpoints/
  step-000012/        one checkpoint
  latest              the name of the newest whole one
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from slime_spec.errors import CheckpointError

LATEST = "latest"
UNFINISHED, REPLACED = ".unfinished", ".replaced"


def step_name(rollout_id: int) -> str:
    return f"step-{rollout_id:06d}"


def resolve_checkpoint(path: str | Path) -> Path:
    """Return the step folder that ``path`` is, or whose name its ``latest`` holds.

    Raises CheckpointError if there is none.
    """
    root = Path(path)
    pointer = root / LATEST
    folder = root / pointer.read_text().strip() if pointer.is_file() else root
    aside = folder.with_name(f".{folder.name}{REPLACED}")
    if aside.exists() and not folder.exists():  # saving this step again was interrupted between its two renames
        folder = aside
    if not (folder / "metadata.json").is_file():
        raise CheckpointError(
            "trainer.load",
            f"must be a checkpoint, or a folder of checkpoints with its file {LATEST!r}",
            str(path),
            "Pass --load DIR with the checkpoints/ folder of a run, or one of its step-NNNNNN folders.",
        )
    return folder


def begin_checkpoint(root: Path, name: str) -> Path:
    """Return an empty folder to write into, beside the whole checkpoints.

    Left-overs of interrupted writes are removed.
    """
    tidy(root)
    unfinished = unfinished_folder(root, name)
    unfinished.mkdir(parents=True)
    return unfinished


def publish_checkpoint(root: Path, name: str) -> None:
    """Move the finished folder into place, then point ``latest`` at it; renames within one file system."""
    pointer = root / f".{LATEST}.unfinished"
    pointer.write_text(name + "\n")
    publish_folder(root, name)
    os.replace(pointer, root / LATEST)


def unfinished_folder(root: Path, name: str) -> Path:
    return root / f".{name}{UNFINISHED}"


def publish_folder(root: Path, name: str) -> None:
    """Rename the unfinished folder to ``root/name``; an older one steps aside, and is deleted when it is replaced."""
    final, replaced = root / name, root / f".{name}{REPLACED}"
    if final.exists():
        final.rename(replaced)
    unfinished_folder(root, name).rename(final)
    if replaced.exists():
        shutil.rmtree(replaced)


def tidy(root: Path, pattern: str = "step-*") -> None:
    """Undo what interrupted writes left: a folder that had stepped aside for one that never came returns.

    ``pattern`` (glob) says whose left-overs.
    """
    for replaced in root.glob(f".{pattern}{REPLACED}"):
        final = _stepped_aside_from(replaced)
        if final.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(final)
    for unfinished in root.glob(f".{pattern}{UNFINISHED}"):
        shutil.rmtree(unfinished)


def _stepped_aside_from(replaced: Path) -> Path:
    return replaced.with_name(replaced.name.removeprefix(".").removesuffix(REPLACED))
