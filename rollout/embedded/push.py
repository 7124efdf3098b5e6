"""The engine's side of a push: verified tensors become a second decoder beside the serving one."""

from __future__ import annotations

from rollout.embedded.model import Decoder
from rollout.embedded.weights import DecoderBuilder
from slime_spec.errors import PushError
from slime_spec.hf.checkpoint import expected_shapes
from slime_spec.hf.model_spec import ModelSpec
from slime_spec.interfaces import WeightTransport
from slime_spec.weights.manifest import Manifest
from slime_spec.weights.push import PushBucket, PushReceiver


class PushStage:
    """One open push; dropping it leaves the engine as it was."""

    def __init__(self, manifest: Manifest, spec: ModelSpec, builder: DecoderBuilder) -> None:
        if manifest.side != "target":
            raise PushError("this engine's drafter has no weights to update")
        self._receiver = PushReceiver(manifest, expected_shapes(spec))
        self._builder = builder
        self.decoder: Decoder | None = None  # set once the push is prepared

    @property
    def version(self) -> int:
        return self._receiver.manifest.version

    @property
    def checksum(self) -> str:
        """Combined checksum of what has been staged so far."""
        return self._receiver.checksum

    def take(self, bucket: PushBucket, transport: WeightTransport) -> None:
        tensors = transport.receive(bucket)
        self._receiver.take(bucket, tensors)
        for meta, tensor in zip(bucket.tensors, tensors, strict=True):
            self._builder.add(meta.name, tensor)

    def prepare(self, version: int, checksum: str) -> None:
        """Build the complete decoder; raises PushError when anything is missing or differs."""
        if version != self.version:
            raise PushError(f"prepare of version {version} inside the push of {self.version}")
        self._receiver.finish(checksum)
        self.decoder = self._builder.finish()
