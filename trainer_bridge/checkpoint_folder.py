"""The folder of a run's checkpoints: which one is the newest whole one, and how one takes its place.

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


def step_name(rollout_id: int) -> str:
    return f"step-{rollout_id:06d}"


def resolve_checkpoint(path: str | Path) -> Path:
    """The step folder that ``path`` is, or whose name its ``latest`` holds; raises CheckpointError if there is none."""
    root = Path(path)
    pointer = root / LATEST
    folder = root / pointer.read_text().strip() if pointer.is_file() else root
    if not (folder / "metadata.json").is_file():
        raise CheckpointError(
            "trainer.load",
            f"must be a checkpoint, or a folder of checkpoints with its file {LATEST!r}",
            str(path),
            "Pass --load DIR with the checkpoints/ folder of a run, or one of its step-NNNNNN folders.",
        )
    return folder


def begin_checkpoint(root: Path, name: str) -> Path:
    """An empty folder to write into, beside the whole checkpoints; left-overs of an interrupted write are removed."""
    unfinished = root / f".{name}.unfinished"
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    return unfinished


def publish_checkpoint(root: Path, name: str) -> None:
    """Move the finished folder into place, then point ``latest`` at it; both are renames within one file system."""
    final, replaced = root / name, root / f".{name}.replaced"
    if final.exists():
        final.rename(replaced)
    (root / f".{name}.unfinished").rename(final)
    pointer = root / f".{LATEST}.unfinished"
    pointer.write_text(name + "\n")
    os.replace(pointer, root / LATEST)
    if replaced.exists():
        shutil.rmtree(replaced)


def drop_checkpoint(root: Path, name: str) -> None:
    """Remove what a failed write left."""
    shutil.rmtree(root / f".{name}.unfinished", ignore_errors=True)
