"""The metadata of a checkpoint is read as every Python pickles it, and what asks for anything else is refused."""

from __future__ import annotations

import io
import pickle
from enum import Enum
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from trainer_bridge.megatron.no_code import FILE, metadata_problem


class AsDebian(pickle.Pickler):
    """Pickles an enum's member as Python 3.11.0 to 3.11.3 do, Debian 12's among them."""

    def reducer_override(self, obj: object) -> object:
        return (getattr, (type(obj), obj.name)) if isinstance(obj, Enum) else NotImplemented


class Asking:
    """Unpickled without care, has ``getattr`` ask this object for that name."""

    def __init__(self, *asked: object) -> None:
        self.asked = asked

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return getattr, self.asked


def metadata() -> Metadata:
    size = torch.Size([2, 3])
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), size)
    return Metadata({"weight": TensorStorageMetadata(TensorProperties(), size, [chunk])}, storage_data={})


@pytest.mark.parametrize("pickler", [pickle.Pickler, AsDebian])
def test_members_of_enums_are_read_as_every_python_pickles_them(pickler: type[pickle.Pickler], tmp_path: Path) -> None:
    out = io.BytesIO()
    pickler(out).dump(metadata())
    (tmp_path / FILE).write_bytes(out.getvalue())
    assert b"getattr" in out.getvalue() or pickler is not AsDebian
    assert metadata_problem(tmp_path) == ""


@pytest.mark.parametrize("asked", [("text", "upper"), (Metadata, "__init__"), (torch.Size, "mro")])
def test_nothing_but_a_member_of_an_enum_is_given_out(asked: tuple[object, str], tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(pickle.dumps(Asking(*asked)))
    assert "which no checkpoint of this format needs" in metadata_problem(tmp_path)
