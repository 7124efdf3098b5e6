"""The engine's half of pushes, the same for every engine: one open push at a time, all or nothing.

BeginPush ──► stage ── PushBucket … ──► PreparePush (whole? equal? built?) ──► CommitPush: the engine takes it over
                │
                └── CancelPush, or whatever fails: the stage is dropped, and the engine is where it was
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, Protocol, TypeVar

import torch

from slime_spec.errors import PushError
from slime_spec.interfaces import WeightTransport
from slime_spec.weights.manifest import Manifest, Side
from slime_spec.weights.push import (
    BeginPush,
    CancelPush,
    CommitPush,
    ContinueGeneration,
    PauseGeneration,
    PauseMode,
    PreparePush,
    PushBucket,
    PushMessage,
    PushReceiver,
    PushReply,
    VerifyPush,
)


class Staging(Protocol):
    """What one side's tensors become before the commit."""

    @property
    def expected(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor the push must bring."""

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one verified tensor, whose memory belongs to the transport."""

    def build(self) -> None:
        """All tensors are there: do everything but take them over."""


S = TypeVar("S", bound=Staging)


class PushStage(Generic[S]):
    """One open push; dropping it leaves the engine as it was."""

    def __init__(self, manifest: Manifest, staging: S) -> None:
        self._receiver = PushReceiver(manifest, staging.expected)
        self.staging = staging
        self._prepared = False

    @property
    def manifest(self) -> Manifest:
        return self._receiver.manifest

    @property
    def checksum(self) -> str:
        """Combined checksum of what has been staged so far."""
        return self._receiver.checksum

    def take(self, bucket: PushBucket, transport: WeightTransport) -> None:
        tensors = transport.receive(bucket)
        self._receiver.take(bucket, tensors)
        for meta, tensor in zip(bucket.tensors, tensors, strict=True):
            self.staging.add(meta.name, tensor)

    def prepare(self, version: int, checksum: str) -> None:
        """Build what will serve; raises PushError when anything is missing or differs."""
        self._check_version("prepare", version)
        self._receiver.finish(checksum)
        self.staging.build()
        self._prepared = True

    def check_commit(self, version: int) -> None:
        """Raise PushError unless this version is prepared."""
        self._check_version("commit", version)
        if not self._prepared:
            raise PushError(f"commit of version {version} before its prepare")

    def _check_version(self, step: str, version: int) -> None:
        if version != self.manifest.version:
            raise PushError(f"{step} of version {version} inside the push of {self.manifest.version}")


class ServingWeights(Protocol[S]):
    """An engine's weights as its pushes see them."""

    def version(self, side: Side) -> int: ...

    def staging(self, manifest: Manifest) -> S:
        """Where the push that begins collects its tensors; raises PushError where it cannot be taken."""

    def commit(self, stage: PushStage[S]) -> None:
        """Serve what is staged, which is prepared, from here on; raises PushError and goes on with what there was."""

    def checksum(self, side: Side) -> str:
        """Combined checksum of the weights the engine computes with, or NOT_COMPARABLE."""

    def pause(self, mode: PauseMode) -> None: ...

    def resume(self) -> None: ...


class PushDesk(Generic[S]):
    """Answers the messages of pushes, of one engine and from one thread at a time. Example::

    desk = PushDesk(engine_index=0, transport=transport, weights=weights)
    desk.answer(BeginPush(manifest))
    """

    def __init__(self, engine_index: int, transport: WeightTransport, weights: ServingWeights[S]) -> None:
        self._index, self._transport, self._weights = engine_index, transport, weights
        self._open: PushStage[S] | None = None

    def answer(self, message: PushMessage) -> PushReply:
        """See RolloutEngine.update_weights."""
        match message:
            case PauseGeneration(_, mode):
                self._weights.pause(mode)
                return self._reply("target")
            case ContinueGeneration():
                self._weights.resume()
                return self._reply("target")
            case VerifyPush(_, side):
                return self._reply(side, self._weights.checksum(side))
        stage, self._open = self._open, None  # whatever fails below drops the push
        match message:
            case BeginPush(manifest):
                stage = PushStage(manifest, self._weights.staging(manifest))
            case PushBucket() if stage is not None:
                stage.take(message, self._transport)
            case PreparePush(version, checksum) if stage is not None:
                stage.prepare(version, checksum)
            case CommitPush(version) if stage is not None:
                stage.check_commit(version)
                self._weights.commit(stage)
                return self._reply(stage.manifest.side, stage.checksum)
            case CancelPush():
                return self._reply("target" if stage is None else stage.manifest.side)
            case _:
                raise PushError(f"{type(message).__name__} of version {message.version} outside a push")
        self._open = stage
        return self._reply(stage.manifest.side, stage.checksum)

    def _reply(self, side: Side, checksum: str = "") -> PushReply:
        return PushReply(self._index, self._weights.version(side), checksum)
