"""Reading a checkpoint executes no code of the checkpoint, although torch's format has pickles in it.

Three kinds of pickle are in a torch_dist folder. ``common.pt`` is read by ``torch.load``, which since torch 2.6 builds
plain types alone. ``.metadata`` is read by ``pickle.load``, which runs whatever the file asks for: it is read here
first, with the few classes that it may hold. Objects within ``.distcp`` files are read by ``torch.load`` with
``weights_only=False``, which torch's own switch overrules.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

FILE = ".metadata"
SWITCH = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # read by torch.load at each call
# The classes of torch.distributed.checkpoint's metadata, format versions of torch 2.4 to 2.13.
CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "collections": {"OrderedDict"},
}
# What a damaged pickle raises, besides UnpicklingError (Python's documentation of pickle.UnpicklingError).
DAMAGE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)


def _member(enum: object, name: str) -> Enum:
    """Return an enum's member by its name: so Python 3.11.0 to 3.11.3 pickle members, with ``getattr`` itself."""
    if not (isinstance(enum, type) and issubclass(enum, Enum)):
        raise pickle.UnpicklingError(f"asks {enum!r} for {name!r}, which no checkpoint of this format needs")
    return enum[name]


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"names {module}.{name}, which no checkpoint of this format needs")


def metadata_problem(folder: Path) -> str:
    """Return what keeps ``folder/.metadata`` from being read by torch, or "" for nothing; executes nothing of it."""
    path = folder / FILE
    if not path.is_file():
        return f"lacks {FILE}"
    try:
        with path.open("rb") as file:
            metadata = _PlainUnpickler(file).load()
        places = list(metadata.storage_data.values())
    except DAMAGE as error:
        return f"{FILE} must be metadata of torch.distributed.checkpoint: {error or type(error).__name__}"
    if not isinstance(metadata, Metadata) or not all(isinstance(each, _StorageInfo) for each in places):
        return f"{FILE} must be metadata of torch.distributed.checkpoint"
    outside = {each.relative_path for each in places if not _is_beside(folder, each.relative_path)}
    return (
        f"{FILE} names files that are not there: {', '.join(map(repr, sorted(map(str, outside))))}" if outside else ""
    )


@contextmanager
def plain_objects_only() -> Iterator[None]:
    """Let every ``torch.load`` of this process build plain types alone while the block runs."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before


def _is_beside(folder: Path, name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and (folder / name).is_file()
