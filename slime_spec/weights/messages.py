"""A push sends one side's weights (target or draft) from the trainer to the engines, all or nothing.

    trainer:  begin(manifest) ── bucket ── bucket ── … ── commit(checksum)
                  │                │                      │
    engines:   validate         stage + verify      prepare: whole? equal? built?     commit: swap the pointers
                                                     every engine says yes first      version = v+1

Until the commit every engine serves version v from weights the push does not touch; a failure before it cancels the
push everywhere. The commit only swaps references; only an engine that dies right then can leave the engines on
different versions, and the error says so. With ``verify`` each engine then reads back the weights it computes with.

Engines generate meanwhile, unless ``pause_mode`` asks for a pause from before the begin until after the verification
(or the failure): ``retract`` has the KV of what was being generated recomputed with the new weights, ``in_place`` keeps
it, ``abort`` ends what was being generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

Side = Literal["target", "draft"]
PauseMode = Literal["abort", "retract", "in_place"]
NamedTensors = Sequence[tuple[str, torch.Tensor]]
NOT_COMPARABLE = ""  # in place of a checksum: the engine has none, or rounds what it is sent (a quantised draft)


@dataclass(frozen=True)
class TensorMeta:
    """Describes a tensor of a manifest: ``TensorMeta("model.norm.weight", (576,), "float32")``."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        size = getattr(torch, self.dtype).itemsize
        for dim in self.shape:
            size *= dim
        return size

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype), f"{self.dtype} is not a torch dtype"
        return dtype


@dataclass(frozen=True)
class Manifest:
    """Lists all tensors that one push sends for one side, in sending order."""

    side: Side
    version: int
    tensors: tuple[TensorMeta, ...]

    @property
    def nbytes(self) -> int:
        return sum(meta.nbytes for meta in self.tensors)


@dataclass(frozen=True)
class Opening:
    """Describes to a transport the push that it will carry, ``receivers`` as in BeginPush, and never empty.

    ``is_new`` says that their processes are new, and no push has reached them.
    """

    side: Side
    version: int
    receivers: tuple[int, ...]
    is_new: bool = False


@dataclass(frozen=True)
class BeginPush:
    """Opens a push; the engine checks every name, shape and dtype before a byte is sent.

    ``routes`` are the transport's own: what an engine needs to receive from the ranks that will publish. ``receivers``
    are the engines that take part, in the order of their places beside those ranks; without them all do.
    """

    manifest: Manifest
    routes: tuple[Any, ...] = ()
    receivers: tuple[int, ...] = ()

    def place_of(self, engine: int) -> int:
        """Return an engine's place among those that take part."""
        return self.receivers.index(engine) if self.receivers else engine


@dataclass(frozen=True)
class PushBucket:
    """Carries some tensors of an open push; ``handle`` is the transport's own, of every rank that publishes them."""

    version: int
    index: int
    tensors: tuple[TensorMeta, ...]
    checksums: tuple[int, ...]
    handle: tuple[Any, ...]


@dataclass(frozen=True)
class PreparePush:
    """Ends the buckets: the engine checks that no tensor is missing, compares checksums and builds what it will use."""

    version: int
    checksum: str


@dataclass(frozen=True)
class CommitPush:
    """Closes a push; ``checksum`` combines the tensors' checksums. A prepared engine only swaps."""

    version: int
    checksum: str


@dataclass(frozen=True)
class VerifyPush:
    """Asks for the combined checksum of the weights the engine computes with, read back out of their own form."""

    version: int
    side: Side = "target"


@dataclass(frozen=True)
class CancelPush:
    """Drops an open push; the engine stays on its version."""

    version: int


@dataclass(frozen=True)
class PauseGeneration:
    """Stops generating until ContinueGeneration; new requests queue. Pausing a paused engine is no error."""

    version: int
    mode: PauseMode


@dataclass(frozen=True)
class ContinueGeneration:
    """Goes on after PauseGeneration, with whatever weights the engine then has."""

    version: int


PushMessage = (
    BeginPush | PushBucket | PreparePush | CommitPush | VerifyPush | CancelPush | PauseGeneration | ContinueGeneration
)


@dataclass(frozen=True)
class PushReply:
    """Reports an engine's committed version and the combined checksum of the tensors it has staged so far.

    Both are of the side the message is about. To VerifyPush it answers with the checksum of the weights in use, or with
    NOT_COMPARABLE.
    """

    engine: int
    version: int
    checksum: str


def meta_of(name: str, tensor: torch.Tensor) -> TensorMeta:
    return TensorMeta(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
