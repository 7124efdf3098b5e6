"""A push of one side's weights (target or draft): trainer to engines, all or nothing.

    trainer:  begin(manifest) ── bucket ── bucket ── … ── commit(checksum)
                  │                │                      │
    engines:   validate         stage + verify      prepare: whole? equal? built?     commit: swap the pointers
                                                     every engine says yes first      version = v+1

Until the commit every engine serves version v from weights the push does not touch; a failure before it cancels the
push everywhere. The commit only swaps references; an engine that dies right then is the one thing that can split the
engines, and the error says so. With ``verify`` each engine then reads back the weights it computes with.

Engines generate meanwhile, unless ``pause_mode`` asks for a pause from before the begin until after the verification
(or the failure): ``retract`` has the KV of what was being generated recomputed with the new weights, ``in_place`` keeps
it, ``abort`` ends what was being generated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Literal, cast, get_args

import torch

from slime_spec.errors import PushError
from slime_spec.weights.manifest import Manifest, Side, TensorMeta, combined_checksum, tensor_checksum

PauseMode = Literal["abort", "retract", "in_place"]
NOT_COMPARABLE = ""  # in place of a checksum: the engine cannot tell, or rounds what it is sent (a quantised draft)


@dataclass(frozen=True)
class BeginPush:
    """Opens a push; the engine checks every name, shape and dtype before a byte is sent."""

    manifest: Manifest


@dataclass(frozen=True)
class PushBucket:
    """Some tensors of an open push; ``handle`` is the transport's own (for Ray, a reference into shared memory)."""

    version: int
    index: int
    tensors: tuple[TensorMeta, ...]
    checksums: tuple[int, ...]
    handle: Any


@dataclass(frozen=True)
class PreparePush:
    """All buckets are sent: the engine checks that none is missing, compares checksums and builds what it will use."""

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
    """An engine's answer: its committed version and the combined checksum of what it has staged so far.

    Both are of the side the message is about. To VerifyPush it answers with the checksum of the weights in use, or with
    NOT_COMPARABLE.
    """

    engine: int
    version: int
    checksum: str


@dataclass(frozen=True)
class PushReport:
    """One finished push, for the metrics ``sync/*``."""

    version: int
    seconds: float
    nbytes: int
    num_tensors: int
    checksum: str
    verified: bool = False
    verify_s: float = 0.0
    paused_s: float = 0.0


logger = logging.getLogger(__name__)

Broadcast = Callable[[PushMessage], Sequence[PushReply]]


def run_push(
    messages: Iterable[PushMessage], broadcast: Broadcast, verify: bool = False, pause_mode: str = "none"
) -> PushReport:
    """Send a push's messages to every engine; raises PushError, every engine still on its old version, on any failure.

    ``broadcast`` delivers one message to all engines and returns their replies (raising if any engine refused).
    ``verify`` reads every engine's weights back after the commit and compares them with the trainer's (the report says
    whether they could be). ``pause_mode`` is a PauseMode, or none.
    """
    pending = iter(messages)
    start = perf_counter()
    try:
        begin = next(pending)
    except Exception as error:
        raise PushError(f"the push could not begin: {error}") from error
    assert isinstance(begin, BeginPush), "a push begins with BeginPush"
    begin_s = perf_counter() - start
    if pause_mode == "none":
        return _push(begin, pending, broadcast, verify, begin_s)
    assert pause_mode in get_args(PauseMode), f"{pause_mode} is no way to pause"
    start = perf_counter()
    try:
        _pause(PauseGeneration(begin.manifest.version, cast(PauseMode, pause_mode)), broadcast)
        report = _push(begin, pending, broadcast, verify, begin_s)
    except PushError:
        _continue_after_failure(ContinueGeneration(begin.manifest.version), broadcast)
        raise
    broadcast(ContinueGeneration(begin.manifest.version))
    return replace(report, paused_s=perf_counter() - start)


def _push(
    begin: BeginPush, rest: Iterable[PushMessage], broadcast: Broadcast, verify: bool, begin_s: float
) -> PushReport:
    """``begin_s`` is what the trainer took for ``begin``."""
    start = perf_counter() - begin_s
    manifest = begin.manifest
    try:
        broadcast(begin)
        for message in rest:
            if isinstance(message, CommitPush):
                break
            replies = broadcast(message)
            if isinstance(message, PushBucket):
                _agree(f"bucket {message.index}", replies)
        else:
            raise PushError("the push ended without a commit")
        _agree("the prepared push", broadcast(PreparePush(message.version, message.checksum)), message.checksum)
    except Exception as error:
        _cancel(manifest, broadcast)
        raise PushError(f"push of version {manifest.version} failed: {error}") from error
    _commit(message, broadcast)
    seconds = perf_counter() - start
    verified = verify and _verify(message, manifest.side, broadcast)
    verify_s = perf_counter() - start - seconds
    return PushReport(
        message.version, seconds, manifest.nbytes, len(manifest.tensors), message.checksum, verified, verify_s
    )


def _pause(message: PauseGeneration, broadcast: Broadcast) -> None:
    try:
        broadcast(message)
    except Exception as error:
        raise PushError(f"an engine could not pause for the push of version {message.version}: {error}") from error


def _continue_after_failure(message: ContinueGeneration, broadcast: Broadcast) -> None:
    try:
        broadcast(message)
    except Exception:
        # The push's error is the one to report; an engine that cannot go on is dead.
        logger.exception("could not continue after the push version=%d", message.version)


def _agree(what: str, replies: Sequence[PushReply], checksum: str | None = None) -> None:
    answers = {reply.checksum for reply in replies}
    if len(answers) != 1 or (checksum is not None and answers != {checksum}):
        raise PushError(f"checksums of {what} differ: engines {sorted(answers)}, trainer {checksum or 'not asked'}")


def _cancel(manifest: Manifest, broadcast: Broadcast) -> None:
    try:
        broadcast(CancelPush(manifest.version))
    except Exception:
        # The first error is the one to report; an engine that cannot even cancel is dead and holds no version.
        logger.exception("could not cancel the push version=%d", manifest.version)


def _commit(message: CommitPush, broadcast: Broadcast) -> None:
    try:
        replies = broadcast(message)
    except Exception as error:
        raise PushError(
            f"an engine failed at the commit of version {message.version}, which others may serve already: {error}"
        ) from error
    behind = [reply for reply in replies if reply.version != message.version]
    if behind:
        raise PushError(f"after the commit of version {message.version} engines answered {behind}")


def _verify(message: CommitPush, side: Side, broadcast: Broadcast) -> bool:
    """Compare what the engines compute with; False where any of them cannot tell."""
    answers = {reply.checksum for reply in broadcast(VerifyPush(message.version, side))}
    if answers - {NOT_COMPARABLE, message.checksum}:
        raise PushError(
            f"after the push of version {message.version} engines compute with {sorted(answers)}, "
            f"the trainer sent {message.checksum}"
        )
    return NOT_COMPARABLE not in answers


def bucketed(
    tensors: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Group tensors, in order, into buckets of at most ``bucket_bytes`` (a larger tensor travels alone)."""
    bucket: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if bucket and size + nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += nbytes
    if bucket:
        yield bucket


class PushReceiver:
    """The engine's half of a push: checks what arrives, hands verified tensors on, and counts what is missing.

    Example::

        receiver = PushReceiver(manifest, expected=expected_shapes(spec))
        receiver.take(bucket, tensors)        # raises PushError naming the tensor
        receiver.finish(commit.checksum)      # raises PushError naming what never came
    """

    def __init__(self, manifest: Manifest, expected: Mapping[str, tuple[int, ...]]) -> None:
        self.manifest = manifest
        sent = {meta.name: meta for meta in manifest.tensors}
        if missing := expected.keys() - sent.keys():
            raise PushError(f"the push lacks {_some(missing)}")
        if unknown := sent.keys() - expected.keys():
            raise PushError(f"the push has tensors this model does not know: {_some(unknown)}")
        for name, shape in expected.items():
            if sent[name].shape != shape:
                raise PushError(f"{name} has shape {sent[name].shape}, the engine expects {shape}")
        self._pending = sent
        self._checksums: dict[str, int] = {}

    @property
    def checksum(self) -> str:
        return combined_checksum(self._checksums.items())

    def take(self, bucket: PushBucket, tensors: Sequence[torch.Tensor]) -> None:
        """Verify one bucket's tensors against the manifest and their checksums."""
        if bucket.version != self.manifest.version:
            raise PushError(f"bucket of version {bucket.version} inside the push of {self.manifest.version}")
        for meta, checksum, tensor in zip(bucket.tensors, bucket.checksums, tensors, strict=True):
            if self._pending.pop(meta.name, None) != meta:
                raise PushError(f"{meta.name} was not announced, came twice or changed shape")
            if tuple(tensor.shape) != meta.shape or tensor.dtype != meta.torch_dtype:
                raise PushError(f"{meta.name} arrived as {tuple(tensor.shape)} {tensor.dtype}")
            arrived = tensor_checksum(tensor)
            if arrived != checksum:
                raise PushError(f"{meta.name} arrived damaged: checksum {arrived:016x}, sent {checksum:016x}")
            self._checksums[meta.name] = arrived

    def finish(self, checksum: str) -> None:
        if self._pending:
            raise PushError(f"the push ended without {_some(self._pending)}")
        if self.checksum != checksum:
            raise PushError(f"combined checksum {self.checksum} differs from the trainer's {checksum}")


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
