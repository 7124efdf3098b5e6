"""This module finds the newest whole checkpoint in a run's folder, and moves a finished checkpoint into the folder.

checkpoints/
  step-000012/        one checkpoint
  latest              the name of the newest whole one
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from slime_spec.errors import CheckpointError
from slime_spec.files import read_text
from trainer_bridge.checksums import METADATA

LATEST = "latest"
STEP = re.compile(r"step-\d{6,}")
NO_POINTER = "Pass --load DIR with one of the step-NNNNNN folders beside it."
UNFINISHED, REPLACED = ".unfinished", ".replaced"


def step_name(rollout_id: int) -> str:
    return f"step-{rollout_id:06d}"


def resolve_checkpoint(path: str | Path) -> Path:
    """Return the newest step folder that ``path`` is or holds: the first of ``checkpoints_in`` with a metadata.json.

    Raises CheckpointError if there is none. Whether its files are whole is found when it is loaded.
    """
    there = [folder for folder in checkpoints_in(path) if (folder / METADATA).is_file()]
    if not there:
        raise CheckpointError(
            "trainer.load",
            f"must be a checkpoint, or a folder of checkpoints with its file {LATEST!r}",
            str(path),
            "Pass --load DIR with the checkpoints/ folder of a run, or one of its step-NNNNNN folders.",
        )
    return there[0]


def checkpoints_in(path: str | Path) -> list[Path]:
    """Return the step folder that ``path`` is; or that its ``latest`` names, then the older ones, the newest first.

    A folder whose first checkpoint came, but not yet its ``latest``, has that checkpoint. Raises CheckpointError for a
    ``latest`` that names no step. The folders may be damaged, or not be there.
    """
    root = Path(path)
    steps = [each for each in root.glob("step-*") if STEP.fullmatch(each.name)]
    if not (root / LATEST).is_file():
        return sorted(steps, key=_number, reverse=True) or [_in_place(root)]
    newest = read_text(root / LATEST, CheckpointError, NO_POINTER).strip()
    if not STEP.fullmatch(newest):
        raise CheckpointError(str(root / LATEST), "must hold the name of a step-NNNNNN folder", newest, NO_POINTER)
    older = [each for each in steps if _number(each) < _number(root / newest)]
    return [_in_place(root / newest), *sorted(older, key=_number, reverse=True)]


def has_checkpoint(path: str | Path) -> bool:
    """Return whether ``path`` holds anything of a whole checkpoint: a folder to save in begins without."""
    root = Path(path)
    kept = (LATEST, METADATA, "step-*", f".step-*{REPLACED}")
    return any(True for pattern in kept for _ in root.glob(pattern))


def saved_step(folder: Path) -> int:
    """Return the step of a checkpoint folder named by ``step_name``; 0 for a folder with another name."""
    found = STEP.search(folder.name)
    return int(found[0].removeprefix("step-")) if found else 0


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


def _in_place(folder: Path) -> Path:
    """Return ``folder``, or where it stands if saving this step again was interrupted between its two renames."""
    aside = folder.with_name(f".{folder.name}{REPLACED}")
    return aside if aside.exists() and not folder.exists() else folder


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _stepped_aside_from(replaced: Path) -> Path:
    return replaced.with_name(replaced.name.removeprefix(".").removesuffix(REPLACED))
