"""PushDesk receives pushes in every engine: one push is open at a time, and the engine takes over all of it or none.

BeginPush ──► stage ── PushBucket … ──► PreparePush (whole? equal? built?) ──► CommitPush: the engine takes it over
                │
                └── CancelPush, or whatever fails: the stage is dropped, and the engine is where it was
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch

from slime_spec.checkpoints.fp8 import LARGEST, has_nan
from slime_spec.checkpoints.quantization import CODES, SCALE, SCALES
from slime_spec.errors import PushError
from slime_spec.interfaces import WeightTransport
from slime_spec.weights.checksums import combined_checksum, tensor_checksums
from slime_spec.weights.messages import (
    BeginPush,
    CancelPush,
    CommitPush,
    ContinueGeneration,
    Manifest,
    PauseGeneration,
    PauseMode,
    PreparePush,
    PushBucket,
    PushMessage,
    PushReply,
    Side,
    TensorMeta,
    VerifyPush,
)
from slime_spec.weights.together import check_together

# Weights are sent as the numbers they are; codes only where the engine expects their scales as well.
WEIGHT_DTYPES = ("float32", "bfloat16", "float16", "float64")


class Staging(Protocol):
    """Builds the weights of one side out of a push's tensors, before the commit."""

    @property
    def expected(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor that the push must bring."""

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add one verified tensor, whose memory belongs to the transport."""

    def keep(self) -> None:
        """Copy what is still in the transport's memory, which is about to be written again."""

    def build(self) -> None:
        """Do everything but take the tensors over, now that all are there."""


@runtime_checkable
class Forwards(Protocol):
    """Is a Staging whose engine never sees the tensors: they go from the trainer's rank to where they are loaded."""

    def forward(self, bucket: PushBucket) -> None:
        """Have the bucket loaded, which has the announced tensors; raises PushError."""

    def drop(self, why: str) -> None:
        """Undo what was loaded of a push that is given up."""


S = TypeVar("S", bound=Staging)


class PushStage(Generic[S]):
    """Holds one open push; dropping it leaves the engine, which computes in ``dtype``, as it was."""

    def __init__(self, manifest: Manifest, staging: S, dtype: torch.dtype) -> None:
        self._receiver = PushReceiver(manifest, staging.expected)
        self.staging, self._dtype = staging, dtype
        self._prepared = False

    @property
    def manifest(self) -> Manifest:
        return self._receiver.manifest

    @property
    def checksum(self) -> str:
        """Return the combined checksum of what has been staged so far."""
        return self._receiver.checksum

    @property
    def checksums(self) -> Mapping[str, int]:
        """Return the checksum of each tensor that has been staged so far."""
        return self._receiver.checksums

    def take(self, bucket: PushBucket, transport: WeightTransport) -> None:
        if isinstance(self.staging, Forwards):
            self._receiver.pass_on(bucket)
            self.staging.forward(bucket)
            return
        tensors = transport.receive(bucket)
        self._receiver.take(bucket, tensors)
        check_values([meta.name for meta in bucket.tensors], tensors, self._dtype)
        for meta, tensor in zip(bucket.tensors, tensors, strict=True):
            self.staging.add(meta.name, tensor)
        if transport.lends:
            self.staging.keep()
            del tensors
            transport.release()
            if self._receiver.has_all:
                transport.close()  # the trainer frees its memory once this is answered: nobody may have it mapped then

    def prepare(self, version: int, checksum: str) -> None:
        """Build what will serve; raises PushError when anything is missing or differs."""
        self._check_version("prepare", version)
        self._receiver.finish(checksum)
        self.staging.build()
        self._prepared = True

    def drop(self, why: str) -> None:
        """Leave the engine as it was before the push."""
        if isinstance(self.staging, Forwards):
            self.staging.drop(why)

    def check_commit(self, version: int) -> None:
        """Raise PushError unless this version is prepared."""
        self._check_version("commit", version)
        if not self._prepared:
            raise PushError(f"commit of version {version} before its prepare")

    def _check_version(self, step: str, version: int) -> None:
        if version != self.manifest.version:
            raise PushError(f"{step} of version {version} inside the push of {self.manifest.version}")


class ServingWeights(Protocol[S]):
    """Gives pushes access to the weights of an engine."""

    def version(self, side: Side) -> int: ...

    def staging(self, manifest: Manifest) -> S:
        """Make the Staging of a push that begins; raises PushError where the engine cannot take the push."""

    def commit(self, stage: PushStage[S]) -> None:
        """Serve the staged, prepared weights from now on; raises PushError and goes on with the weights from before."""

    def checksum(self, side: Side) -> str:
        """Return the combined checksum of the weights the engine computes with, or NOT_COMPARABLE."""

    def pause(self, mode: PauseMode) -> None: ...

    def resume(self) -> None: ...


class PushDesk(Generic[S]):
    """Answers the messages of pushes, of one engine that computes in ``dtype`` and from one thread at a time. Example::

    desk = PushDesk(engine_index=0, transport=transport, weights=weights, dtype=torch.bfloat16)
    desk.answer(BeginPush(manifest))
    """

    def __init__(
        self, engine_index: int, transport: WeightTransport, weights: ServingWeights[S], dtype: torch.dtype
    ) -> None:
        self._index, self._transport, self._weights, self._dtype = engine_index, transport, weights, dtype
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
        try:
            return self._answer_inside(message, stage)
        except BaseException as error:
            if stage is not None:
                stage.drop(str(error))
            raise

    def _answer_inside(self, message: PushMessage, stage: PushStage[S] | None) -> PushReply:
        match message:
            case BeginPush(manifest, routes):
                if stage is not None:
                    stage.drop("another push begins")
                stage = PushStage(manifest, self._weights.staging(manifest), self._dtype)
                self._transport.join(routes, message.place_of(self._index))
            case PushBucket() if stage is not None:
                stage.take(message, self._transport)
            case PreparePush(version, checksum) if stage is not None:
                stage.prepare(version, checksum)
                self._transport.close()
            case CommitPush(version) if stage is not None:
                stage.check_commit(version)
                self._weights.commit(stage)
                return self._reply(stage.manifest.side, stage.checksum)
            case CancelPush():
                self._transport.close()
                if stage is not None:
                    stage.drop("the push was cancelled")
                return self._reply("target" if stage is None else stage.manifest.side)
            case _:
                raise PushError(f"{type(message).__name__} of version {message.version} outside a push")
        self._open = stage
        return self._reply(stage.manifest.side, stage.checksum)

    def _reply(self, side: Side, checksum: str = "") -> PushReply:
        return PushReply(self._index, self._weights.version(side), checksum)


class PushReceiver:
    """Checks the tensors of a push as they arrive, and keeps count of the missing tensors.

    Example::

        receiver = PushReceiver(manifest, expected=expected_shapes(spec))
        receiver.take(bucket, tensors)        # raises PushError naming the tensor
        receiver.finish(commit.checksum)      # raises PushError naming the missing tensors
    """

    def __init__(self, manifest: Manifest, expected: Mapping[str, tuple[int, ...]]) -> None:
        self.manifest = manifest
        sent = {meta.name: meta for meta in manifest.tensors}
        if missing := expected.keys() - sent.keys():
            raise PushError(f"the push lacks {_some(missing)}")
        check_part(manifest.tensors, expected)
        if len(sent) < len(manifest.tensors):
            raise PushError("the push announces a tensor twice")
        self._pending, self._names = sent, frozenset(sent)
        self.checksums: dict[str, int] = {}

    @property
    def checksum(self) -> str:
        return combined_checksum(self.checksums.items())

    @property
    def has_all(self) -> bool:
        return not self._pending

    def take(self, bucket: PushBucket, tensors: Sequence[torch.Tensor]) -> None:
        """Verify one bucket's tensors against the manifest and their checksums."""
        self._check_announced(bucket)
        for meta, tensor in zip(bucket.tensors, tensors, strict=True):
            if tuple(tensor.shape) != meta.shape or tensor.dtype != meta.torch_dtype:
                raise PushError(f"{meta.name} arrived as {tuple(tensor.shape)} {tensor.dtype}")
        for meta, sent, arrived in zip(bucket.tensors, bucket.checksums, tensor_checksums(tensors), strict=True):
            if arrived != sent:
                raise PushError(f"{meta.name} arrived damaged: checksum {arrived:016x}, sent {sent:016x}")
            self.checksums[meta.name] = arrived

    def pass_on(self, bucket: PushBucket) -> None:
        """Verify a bucket, of which only its sender has the tensors, against the manifest."""
        self._check_announced(bucket)
        for meta, sent in zip(bucket.tensors, bucket.checksums, strict=True):
            self.checksums[meta.name] = sent

    def _check_announced(self, bucket: PushBucket) -> None:
        if bucket.version != self.manifest.version:
            raise PushError(f"bucket of version {bucket.version} inside the push of {self.manifest.version}")
        check_together([meta.name for meta in bucket.tensors], self._names)
        for meta in bucket.tensors:
            if self._pending.pop(meta.name, None) != meta:
                raise PushError(f"{meta.name} was not announced, came twice or changed shape")

    def finish(self, checksum: str) -> None:
        if self._pending:
            raise PushError(f"the push ended without {_some(self._pending)}")
        if self.checksum != checksum:
            raise PushError(f"combined checksum {self.checksum} differs from the trainer's {checksum}")


def check_part(tensors: Sequence[TensorMeta], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise PushError, naming tensors, where some of a push's tensors are unknown or of another shape or dtype."""
    if unknown := {meta.name for meta in tensors} - expected.keys():
        raise PushError(f"the push has tensors this model does not know: {_some(unknown)}")
    for meta in tensors:
        if meta.shape != expected[meta.name]:
            raise PushError(f"{meta.name} has shape {meta.shape}, the engine expects {expected[meta.name]}")
        if (dtype := _dtype_of_fp8(meta.name, expected)) is not None:
            if meta.dtype != dtype:
                raise PushError(
                    f"{meta.name} is {meta.dtype}, and the engine has this weight in fp8: it must be {dtype}"
                )
        elif meta.dtype not in WEIGHT_DTYPES:
            raise PushError(f"{meta.name} is {meta.dtype}: weights must be one of {', '.join(WEIGHT_DTYPES)}")


def _dtype_of_fp8(name: str, expected: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return the dtype of codes, or of their scales; None for a tensor that is neither in the engine."""
    if name.endswith(SCALE):
        return SCALES
    return CODES if name + SCALE in expected else None


def check_values(names: Sequence[str], tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
    """Raise PushError unless every value is a finite number, also in the engine's ``dtype``.

    Checksums say nothing of it: where the trainer's cast overflowed, both sides hold infinity. The tensors are on one
    device, which is asked once.
    """
    full = [(name, tensor.detach()) for name, tensor in zip(names, tensors, strict=True) if tensor.numel()]
    if not full:
        return
    # NaN where the tensor holds NaN; a cast keeps their order, and float64 holds them as they are.
    extremes = torch.stack([_extremes(name, tensor) for name, tensor in full]).cpu()
    for (name, tensor), of_tensor in zip(full, extremes, strict=True):
        sent, kept = (str(each).removeprefix("torch.") for each in (tensor.dtype, dtype))
        if not bool(of_tensor.isfinite().all()):
            raise PushError(f"{name} ({sent}) holds NaN or infinity: weights must be finite numbers")
        if tensor.dtype != getattr(torch, CODES) and not bool(of_tensor.to(dtype).isfinite().all()):
            largest = float(of_tensor.abs().max())
            raise PushError(f"{name} ({sent}) holds {largest:.3g}, which is infinite in the engine's {kept}")


def _extremes(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the least and the largest number; of codes whether they are any, of scales what the largest code is."""
    if tensor.dtype == getattr(torch, CODES):
        return torch.where(has_nan(tensor), torch.nan, 0.0).double().expand(2)
    return torch.stack(tensor.aminmax()).double() * (LARGEST if name.endswith(SCALE) else 1)


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
