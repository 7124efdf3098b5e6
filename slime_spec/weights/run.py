"""The trainer's side of a push makes messages of named tensors and sends every engine all of them or nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Protocol, cast, get_args

import torch

from slime_spec.errors import PushError
from slime_spec.interfaces import WeightTransport
from slime_spec.weights.checksums import combined_checksum, tensor_checksums
from slime_spec.weights.messages import (
    NOT_COMPARABLE,
    BeginPush,
    CancelPush,
    CommitPush,
    ContinueGeneration,
    Manifest,
    NamedTensors,
    Opening,
    PauseGeneration,
    PauseMode,
    PreparePush,
    PushBucket,
    PushMessage,
    PushReply,
    Side,
    VerifyPush,
    meta_of,
)
from slime_spec.weights.together import units

LOOPBACK = "127.0.0.1"
logger = logging.getLogger(__name__)

Broadcast = Callable[[PushMessage], Sequence[PushReply]]


@dataclass(frozen=True)
class PushReport:
    """Reports a finished push, for the metrics ``sync/*``."""

    version: int
    seconds: float
    nbytes: int
    num_tensors: int
    checksum: str
    verified: bool = False
    verify_s: float = 0.0
    paused_s: float = 0.0


def run_push(
    messages: Iterable[PushMessage], broadcast: Broadcast, verify: bool = False, pause_mode: str = "none"
) -> PushReport:
    """Send a push's messages to every engine, all or nothing.

    ``broadcast`` delivers one message to all engines, to the others too where an engine refuses, and returns their
    replies or raises. ``verify`` reads every engine's weights back after the commit and compares them with the
    trainer's (the report says whether they could be). ``pause_mode`` is a PauseMode, or none.

    Whatever is raised on the way, an interrupt of this process included, every engine is told to cancel the push and to
    go on generating: before the commit all of them are then on their old version. An Exception up to the commit is
    raised as PushError; anything else as it is.
    """
    pending = iter(messages)
    start = perf_counter()
    with _as_push_error("the push could not begin"):
        begin = next(pending)
    assert isinstance(begin, BeginPush), "a push begins with BeginPush"
    begin_s = perf_counter() - start
    if pause_mode == "none":
        return _push(begin, pending, broadcast, verify, begin_s)
    assert pause_mode in get_args(PauseMode), f"{pause_mode} is no way to pause"
    version = begin.manifest.version
    start = perf_counter()
    with _undone_by(ContinueGeneration(version), broadcast):
        with _as_push_error(f"an engine could not pause for the push of version {version}"):
            broadcast(PauseGeneration(version, cast(PauseMode, pause_mode)))
        report = _push(begin, pending, broadcast, verify, begin_s)
        broadcast(ContinueGeneration(version))
    return replace(report, paused_s=perf_counter() - start)


class Receiving(Protocol):
    """Is of Engines what pushes need."""

    def receivers(self) -> tuple[int, ...]: ...

    def broadcast(self, message: PushMessage) -> Sequence[PushReply]: ...

    def leave_out_failed(self, refusing: bool) -> bool: ...


def push_to_living(
    make: Callable[[tuple[int, ...]], Generator[PushMessage, None, None]],
    engines: Receiving,
    side: Side,
    verify: bool = False,
    pause_mode: str = "none",
) -> PushReport | None:
    """Run the push that ``make`` makes for the engines that live; where some of them fail, again without those.

    An engine fails that dies, and one that alone does not take the target's weights: it must not go on with others
    than the rest. Returns None where none is left: what is made in their place is brought to the same weights. Raises
    PushError where a push failed for another reason.
    """
    while receivers := engines.receivers():
        with closing(make(receivers)) as messages:
            try:
                return run_push(messages, engines.broadcast, verify, pause_mode)
            except PushError as error:
                if not engines.leave_out_failed(refusing=side == "target"):
                    raise
                logger.warning("the push is repeated without the engines at which it failed error=%s", error)
    return None


def _push(
    begin: BeginPush, rest: Iterable[PushMessage], broadcast: Broadcast, verify: bool, begin_s: float
) -> PushReport:
    """Send the push after its pause; ``begin_s`` is the time that the trainer took for ``begin``."""
    start = perf_counter() - begin_s
    manifest = begin.manifest
    version = manifest.version
    with _undone_by(CancelPush(version), broadcast):
        with _as_push_error(f"push of version {version} failed"):
            commit = _prepare(begin, rest, broadcast)
        with _as_push_error(f"an engine failed at the commit of version {version}, which others may serve already"):
            replies = broadcast(commit)
        if behind := [reply for reply in replies if reply.version != version]:
            raise PushError(f"after the commit of version {version} engines answered {behind}")
        seconds = perf_counter() - start
        verified = verify and _verify(commit, manifest.side, broadcast)
    verify_s = perf_counter() - start - seconds
    return PushReport(version, seconds, manifest.nbytes, len(manifest.tensors), commit.checksum, verified, verify_s)


def _prepare(begin: BeginPush, rest: Iterable[PushMessage], broadcast: Broadcast) -> CommitPush:
    """Bring every engine to where it only swaps; returns the commit, not sent yet."""
    broadcast(begin)
    for message in rest:
        if isinstance(message, CommitPush):
            _agree("the prepared push", broadcast(PreparePush(message.version, message.checksum)), message.checksum)
            return message
        replies = broadcast(message)
        if isinstance(message, PushBucket):
            _agree(f"bucket {message.index}", replies)
    raise PushError("the push ended without a commit")


@contextmanager
def _as_push_error(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise PushError(f"{what}: {error}") from error


@contextmanager
def _undone_by(undo: CancelPush | ContinueGeneration, broadcast: Broadcast) -> Iterator[None]:
    """Send ``undo`` to every engine where the block raises anything at all: the engines live on without it."""
    try:
        yield
    except BaseException:
        try:
            broadcast(undo)
        except Exception:
            # The block's error is the one to report; an engine that cannot even do this is dead or hangs.
            logger.exception("an engine did not take what undoes a push message=%s", undo)
        raise


def _agree(what: str, replies: Sequence[PushReply], checksum: str | None = None) -> None:
    answers = {reply.checksum for reply in replies}
    if len(answers) != 1 or (checksum is not None and answers != {checksum}):
        raise PushError(f"checksums of {what} differ: engines {sorted(answers)}, trainer {checksum or 'not asked'}")


def _verify(message: CommitPush, side: Side, broadcast: Broadcast) -> bool:
    """Compare the weights that the engines compute with; False where an engine cannot compare its weights."""
    answers = {reply.checksum for reply in broadcast(VerifyPush(message.version, side))}
    if answers - {NOT_COMPARABLE, message.checksum}:
        raise PushError(
            f"after the push of version {message.version} engines compute with {sorted(answers)}, "
            f"the trainer sent {message.checksum}"
        )
    return NOT_COMPARABLE not in answers


def push_messages(
    weights: Mapping[str, torch.Tensor],
    version: int,
    side: Side,
    bucket_bytes: int,
    transport: WeightTransport,
    num_engines: int = 1,
    receivers: tuple[int, ...] = (),
) -> Generator[PushMessage, None, None]:
    """Yield the messages of a push of given weights to engines on this machine, for ``run_push``.

    ``receivers`` as in BeginPush, where not all of ``num_engines`` take part.
    """
    checksums: list[tuple[str, int]] = []
    try:
        route = transport.open(LOOPBACK, Opening(side, version, receivers or tuple(range(num_engines))))
        yield begin_of(manifest_of(side, version, weights), [route], receivers)
        for index, named in enumerate(bucketed(weights.items(), bucket_bytes)):
            bucket = bucket_of(named, version, index, transport)
            checksums += zip((name for name, _ in named), bucket.checksums, strict=True)
            yield bucket
    finally:
        transport.close()
    yield CommitPush(version, combined_checksum(checksums))


def begin_of(manifest: Manifest, routes: Sequence[Any], receivers: tuple[int, ...] = ()) -> BeginPush:
    """Return the message that opens a push; ``routes`` are what ``open`` has returned at each rank that publishes."""
    return BeginPush(manifest, tuple(route for route in routes if route is not None), receivers)


def manifest_of(side: Side, version: int, weights: Mapping[str, torch.Tensor]) -> Manifest:
    return Manifest(side, version, tuple(meta_of(name, tensor) for name, tensor in weights.items()))


def bucket_of(named: NamedTensors, version: int, index: int, transport: WeightTransport) -> PushBucket:
    """Publish tensors and return their bucket: names, shapes, dtypes and checksums."""
    tensors = [tensor for _, tensor in named]
    return PushBucket(
        version=version,
        index=index,
        tensors=tuple(meta_of(name, tensor) for name, tensor in named),
        checksums=tensor_checksums(tensors),
        handle=transport.publish(named),
    )


def bucketed(
    tensors: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Group tensors, in order, into buckets of at most ``bucket_bytes``.

    A larger tensor travels alone, and tensors that travel together are never parted.
    """
    bucket: list[tuple[str, torch.Tensor]] = []
    size = 0
    for unit in units(tensors):
        nbytes = sum(tensor.numel() * tensor.element_size() for _, tensor in unit)
        if bucket and size + nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket += unit
        size += nbytes
    if bucket:
        yield bucket
