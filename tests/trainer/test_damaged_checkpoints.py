"""A damaged checkpoint is never loaded, an older whole one is; and nothing in a checkpoint is executed.

Case corrupt.py: bytes flipped at several places of a .distcp, files cut, empty or gone, a ``latest`` that names none,
and pickles that would run a command.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from slime_spec.errors import CheckpointError
from tests.trainer.trainer_support import make_policy, run_ranks, tiny_config
from trainer_bridge.checkpoint_folder import checkpoints_in, resolve_checkpoint
from trainer_bridge.checksums import CHECKSUMS, damage, sums_of, write_checksums

NEWEST, OLDER = "step-000002", "step-000001"


class Boom:
    """Unpickled without care, creates the file ``mark``."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def largest(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)


def flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 0x55
    path.write_bytes(data)


def sealed_again(folder: Path) -> None:
    """Write checksums of the folder as it is now, as who tampers with it would."""
    (folder / CHECKSUMS).unlink()
    write_checksums(folder, sums_of(folder.iterdir()))


def poison_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Boom(folder.parent / "executed")))
    sealed_again(folder)


def poison_common(folder: Path) -> None:
    torch.save({"run": Boom(folder.parent / "executed")}, folder / "common.pt")
    sealed_again(folder)


def poison_object(folder: Path) -> None:
    """Put a poisoned pickle where the metadata says that an object of the model lies (each of them)."""
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    written = io.BytesIO()
    torch.save([Boom(folder.parent / "executed")], written)
    files: dict[str, bytes] = {}
    for index, place in metadata.storage_data.items():
        if "_extra_state" in index.fqn:
            data = files.setdefault(place.relative_path, (folder / place.relative_path).read_bytes())
            place.offset, place.length = len(data), len(written.getvalue())
            files[place.relative_path] = data + written.getvalue()
    assert files
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    sealed_again(folder)


def put_on_a_broken_disk(folder: Path) -> None:
    """Have the reading of a file fail in the middle, as a broken disk does."""
    path = largest(folder)
    path.unlink()
    path.symlink_to("/proc/self/mem")  # opens, and gives no byte
    stored = json.loads((folder / CHECKSUMS).read_text())
    stored["sha256"][path.name]["bytes"] = path.stat().st_size
    (folder / CHECKSUMS).write_text(json.dumps(stored))


def drop_checksums(folder: Path) -> None:
    (folder / CHECKSUMS).unlink()


# What is done to the newest step, by what follows: the older step is loaded, neither is, or the newest is.
FALLS_BACK: dict[str, Callable[[Path], object]] = {
    **{f"a byte of .distcp flipped at {at}": lambda step, at=at: flip(largest(step), at) for at in (0.2, 0.5, 0.8)},
    "a byte of common.pt flipped": lambda step: flip(step / "common.pt", 0.5),
    "a byte of .metadata flipped": lambda step: flip(step / ".metadata", 0.5),
    "a byte of checksums.json flipped": lambda step: flip(step / CHECKSUMS, 0.5),
    ".distcp cut": lambda step: os.truncate(largest(step), largest(step).stat().st_size // 2),
    ".distcp gone": lambda step: largest(step).unlink(),
    ".metadata empty": lambda step: os.truncate(step / ".metadata", 0),
    "metadata.json cut": lambda step: os.truncate(step / "metadata.json", 3),
    "metadata.json gone": lambda step: (step / "metadata.json").unlink(),
    "checksums.json cut": lambda step: os.truncate(step / CHECKSUMS, 9),
    "the whole step gone": shutil.rmtree,
    ".distcp on a broken disk": put_on_a_broken_disk,
    "code in .metadata": poison_metadata,
}
REFUSED: dict[str, Callable[[Path], object]] = {"code in common.pt": poison_common, "code in .distcp": poison_object}
LOADS: dict[str, Callable[[Path], object]] = {"untouched": lambda step: None, "no checksums": drop_checksums}
ITSELF = "a damaged step that was named itself"
CASES = {**FALLS_BACK, **REFUSED, **LOADS}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """Each case's outcome: the step that was loaded and the error; all loads in one process of a rank."""
    root = tmp_path_factory.mktemp("damaged")
    config = tiny_config(make_policy(root / "policy", "Qwen3ForCausalLM"))
    (digests,) = run_ranks(1, "save_two_steps", config, str(root / "saved"))
    for name, spoil in CASES.items():
        shutil.copytree(root / "saved", root / name)
        spoil(root / name / NEWEST)
    places = [root / name for name in CASES] + [root / ".distcp gone" / NEWEST]
    (loaded,) = run_ranks(1, "load_each", config, [str(place) for place in places])
    steps = {digests[0]: OLDER, digests[1]: NEWEST, "": ""}
    assert not list(root.glob("*/executed")), "a checkpoint's code was executed"
    return {name: (steps[digest], error) for name, (digest, error) in zip([*CASES, ITSELF], loaded, strict=True)}


@pytest.mark.parametrize("name", [*CASES, ITSELF])
def test_what_is_loaded_is_whole(name: str, outcomes: dict[str, tuple[str, str]]) -> None:
    loaded, error = outcomes[name]
    assert loaded == (OLDER if name in FALLS_BACK else NEWEST if name in LOADS else "")
    assert ("must be a whole checkpoint of this model" in error) == (name in REFUSED or name == ITSELF)


def test_code_would_run_if_nothing_kept_it(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Boom(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


@pytest.fixture
def written(tmp_path: Path) -> Path:
    folder = tmp_path / NEWEST
    folder.mkdir()
    for name in ("metadata.json", "a.distcp", "b.distcp"):
        (folder / name).write_text(name * 100)
    write_checksums(folder, sums_of(folder.iterdir()))
    return folder


def test_ranks_share_the_reading_and_together_find_what_one_would(written: Path) -> None:
    assert damage(written) == ""
    flip(written / "b.distcp", 0.5)
    found = [damage(written, rank, 3) for rank in range(3)]
    assert sorted(found) == ["", "", damage(written)]
    assert "b.distcp has another SHA-256" in damage(written)


@pytest.mark.parametrize("text", ["[]", "{}", '{"sha256": {"a.distcp": 3}}', '{"sha256": {"../latest": {"bytes": 1}}}'])
def test_checksums_of_another_form_are_damage(written: Path, text: str) -> None:
    (written / CHECKSUMS).write_text(text)
    assert damage(written)


def test_a_file_more_is_damage(written: Path) -> None:
    (written / "__9_0.distcp").write_text("")
    assert damage(written) == "__9_0.distcp has no checksum"


@pytest.mark.parametrize("pointer", [b"\xff\xfe\x00", b"", b"../elsewhere\n", b"step-\n", b"step-000002\x00"])
def test_a_latest_that_names_no_step_is_one_error(tmp_path: Path, pointer: bytes) -> None:
    (tmp_path / "latest").write_bytes(pointer)
    with pytest.raises(CheckpointError, match=r"latest: must .* Pass --load DIR with one of the step-NNNNNN folders"):
        resolve_checkpoint(tmp_path)


def test_steps_older_than_latest_follow_the_newest_first(tmp_path: Path) -> None:
    for name in ("step-000001", "step-000010", "step-000009", "step-000011", "step-x", ".step-000003.unfinished"):
        (tmp_path / name).mkdir()
    (tmp_path / "latest").write_text("step-000010\n")
    assert [each.name for each in checkpoints_in(tmp_path)] == ["step-000010", "step-000009", "step-000001"]
