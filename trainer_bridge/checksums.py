"""A checkpoint folder holds the SHA-256 of each of its files, so that flipped bytes are found before they are weights.

checksums.json: ``{"sha256": {"__0_0.distcp": {"bytes": 193519, "sha256": "9f86d0…"}, …}}``; it names every other file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from slime_spec.errors import CheckpointError
from slime_spec.files import read_json_object, write_whole

CHECKSUMS = "checksums.json"
METADATA = "metadata.json"  # Megatron's, of the format; each of its checkpoints has one

Sums = Mapping[str, Mapping[str, int | str]]


def sums_of(files: Iterable[Path]) -> dict[str, dict[str, int | str]]:
    """Return the size in bytes and the SHA-256 of each of ``files``, by name."""
    return {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}


def write_checksums(folder: Path, sums: Sums) -> None:
    """Write ``folder/checksums.json``; asserts that ``sums`` has every file that is there."""
    absent = {path.name for path in folder.iterdir()} - set(sums)
    assert not absent, f"files of the checkpoint have no checksum: {sorted(absent)}"
    write_whole(folder / CHECKSUMS, json.dumps({"sha256": dict(sums)}, indent=1) + "\n")


def has_checksums(folder: Path) -> bool:
    """Return whether the checkpoint was written with checksums; those of early releases were not."""
    return (folder / CHECKSUMS).exists()


def damage(folder: Path, rank: int = 0, num_ranks: int = 1) -> str:
    """Return what is wrong with a checkpoint's files, or "" for nothing; ``rank`` of ``num_ranks`` reads its share.

    Every rank compares names and sizes; contents are read once by all ranks together.
    """
    try:
        return _damage(folder, rank, num_ranks)
    except OSError as error:  # a disk that gives the bytes no more; the other ranks wait for an answer
        return f"cannot be read: {error}"


def _damage(folder: Path, rank: int, num_ranks: int) -> str:
    if not (folder / METADATA).is_file():
        return f"lacks {METADATA}"
    if not has_checksums(folder):
        return ""
    try:
        stored = read_json_object(folder / CHECKSUMS, CheckpointError).get("sha256")
    except CheckpointError as error:
        return f"{CHECKSUMS} {error.rule}"
    if not isinstance(stored, dict) or not all(isinstance(each, dict) for each in stored.values()):
        return f"{CHECKSUMS} must have the sums of all files under sha256"
    problems = [_problem(folder, name, stored[name], index % num_ranks == rank) for index, name in enumerate(stored)]
    unknown = {path.name for path in folder.iterdir()} - set(stored) - {CHECKSUMS}
    return "; ".join([*filter(None, problems), *(f"{name} has no checksum" for name in sorted(unknown))])


def _problem(folder: Path, name: str, stored: Mapping[str, object], is_read: bool) -> str:
    path = folder / name
    if Path(name).name != name or not path.is_file():
        return f"lacks {name}"
    if (size := path.stat().st_size) != stored.get("bytes"):
        return f"{name} has {size} bytes of {stored.get('bytes')}"
    return (
        f"{name} has another SHA-256 than when it was written"
        if is_read and _sha256(path) != stored.get("sha256")
        else ""
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
