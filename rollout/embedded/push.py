"""The engine's side of a push: verified tensors are built up beside the weights that serve, then swapped in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from rollout.embedded.core import GenerationCore
from rollout.embedded.drafting import DraftWeights
from rollout.embedded.weights import DecoderBuilder, named_tensors
from slime_spec.errors import PushError
from slime_spec.hf.checkpoint import expected_shapes
from slime_spec.hf.model_spec import ModelSpec
from slime_spec.interfaces import WeightTransport
from slime_spec.weights.manifest import Manifest, Side, tensor_checksum
from slime_spec.weights.push import PushBucket, PushReceiver


class Staging(Protocol):
    """What one side's tensors become, before and at the commit."""

    @property
    def expected(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor the push must bring."""

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one verified tensor, whose memory belongs to the transport."""

    def build(self) -> None:
        """All tensors are there: do everything but the swap."""

    def commit(self, core: GenerationCore, version: int) -> None:
        """Swap, on the core's thread."""


class TargetStaging:
    """A second decoder beside the serving one."""

    def __init__(self, spec: ModelSpec, builder: DecoderBuilder) -> None:
        self.expected = expected_shapes(spec)
        self._builder = builder

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._builder.add(name, tensor)

    def build(self) -> None:
        self._decoder = self._builder.finish()

    def commit(self, core: GenerationCore, version: int) -> None:
        core.use(self._decoder, version)


class DraftStaging:
    """The draft's tensors, which its drafter takes as they are."""

    def __init__(self, weights: DraftWeights) -> None:
        self.expected = weights.shapes
        self._tensors: dict[str, torch.Tensor] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._tensors[name] = tensor.clone()

    def build(self) -> None:
        pass

    def commit(self, core: GenerationCore, version: int) -> None:
        core.use_draft(self._tensors, version)


class PushStage:
    """One open push; dropping it leaves the engine as it was."""

    def __init__(self, manifest: Manifest, staging: Staging) -> None:
        self._receiver = PushReceiver(manifest, staging.expected)
        self._staging = staging
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
            self._staging.add(meta.name, tensor)

    def prepare(self, version: int, checksum: str) -> None:
        """Build what will serve; raises PushError when anything is missing or differs."""
        self._check_version("prepare", version)
        self._receiver.finish(checksum)
        self._staging.build()
        self._prepared = True

    def check_commit(self, version: int) -> None:
        """Raise PushError unless this version is prepared."""
        self._check_version("commit", version)
        if not self._prepared:
            raise PushError(f"commit of version {version} before its prepare")

    def commit(self, core: GenerationCore) -> None:
        """Swap, on the core's thread."""
        self._staging.commit(core, self.manifest.version)

    def _check_version(self, step: str, version: int) -> None:
        if version != self.manifest.version:
            raise PushError(f"{step} of version {version} inside the push of {self.manifest.version}")


def tensor_checksums(core: GenerationCore, side: Side) -> dict[str, int]:
    """Checksum of every tensor one side computes with; equal to a push's where both have the same dtype."""
    if side == "target":
        tensors = named_tensors(core.decoder)
    else:
        tensors = {} if core.drafter.weights is None else core.drafter.weights.tensors()
    return {name: tensor_checksum(tensor) for name, tensor in tensors.items()}
