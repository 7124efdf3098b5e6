"""The core takes over pushed weights: verified tensors are built up beside the serving weights, then swapped in."""

from __future__ import annotations

from typing import Protocol

import torch

from rollout.embedded.assemble import Assembly
from rollout.embedded.core import GenerationCore
from rollout.embedded.drafting import DraftWeights, Swap
from rollout.embedded.loop_thread import LoopThread
from rollout.embedded.weights import DecoderBuilder, named_tensors
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import expected_shapes
from slime_spec.errors import PushError
from slime_spec.weights.checksums import combined_checksum, tensor_checksums
from slime_spec.weights.messages import (
    NOT_COMPARABLE,
    Manifest,
    PauseMode,
    Side,
)
from slime_spec.weights.receive import PushStage, Staging


class CoreStaging(Staging, Protocol):
    """Stages tensors that a core takes over; ``build`` makes ``swap``, all that is left to the core's thread."""

    swap: Swap


class TargetStaging:
    """Builds a second decoder beside the serving decoder, and what the drafter shares with it."""

    swap: Swap

    def __init__(self, spec: ModelSpec, builder: DecoderBuilder, core: GenerationCore) -> None:
        self.expected = expected_shapes(spec)
        self._builder, self._core = builder, core

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._builder.add(name, tensor)

    def keep(self) -> None:
        self._builder.keep()

    def build(self) -> None:
        self.swap = self._core.prepared(self._builder.finish())


class DraftStaging:
    """Collects the draft's tensors and builds a second draft of them."""

    swap: Swap

    def __init__(self, weights: DraftWeights) -> None:
        self.expected = weights.shapes
        self._weights = weights
        self._tensors: dict[str, torch.Tensor] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._tensors[name] = tensor.clone()

    def keep(self) -> None:
        pass  # ``add`` has copied every tensor

    def build(self) -> None:
        self.swap = self._weights.build(self._tensors)
        self._tensors = {}


class CoreWeights:
    """Changes and reads the weights of a running core, always between two rounds and on the core's thread."""

    def __init__(self, assembly: Assembly, core: GenerationCore, thread: LoopThread) -> None:
        self._assembly, self._core, self._thread = assembly, core, thread

    def version(self, side: Side) -> int:
        return self._core.version if side == "target" else self._core.draft_version

    def staging(self, manifest: Manifest) -> CoreStaging:
        """Return a staging for one push; the caller's thread packs the tensors, while the core goes on serving."""
        if manifest.side == "target":
            return TargetStaging(self._assembly.spec, self._assembly.builder(self._core.decoder.device), self._core)
        if self._core.drafter.weights is None:
            algorithm = self._assembly.config.speculative.algorithm
            raise PushError(f"the drafter of speculative.algorithm {algorithm} has no weights to update")
        return DraftStaging(self._core.drafter.weights)

    def commit(self, stage: PushStage[CoreStaging]) -> None:
        side, version = stage.manifest.side, stage.manifest.version
        self._thread.call(lambda: self._core.take_over(side, stage.staging.swap, version))

    def checksum(self, side: Side) -> str:
        """Return the checksum of one side, combined as by a push.

        A quantised draft's weights differ from the pushed ones.
        """
        draft = self._core.drafter.weights
        if side == "draft" and draft is not None and not draft.exact:
            return NOT_COMPARABLE
        return combined_checksum(self.tensor_checksums(side).items())

    def tensor_checksums(self, side: Side) -> dict[str, int]:
        """Return the checksum of every tensor that one side computes with; equal to a push's if both have one dtype."""
        return self._thread.call(lambda: _tensor_checksums(self._core, side))

    def pause(self, mode: PauseMode) -> None:
        self._thread.call(lambda: self._core.pause(mode))

    def resume(self) -> None:
        self._thread.call(self._core.resume)


def _tensor_checksums(core: GenerationCore, side: Side) -> dict[str, int]:
    if side == "target":
        tensors = named_tensors(core.decoder)
    else:
        tensors = {} if core.drafter.weights is None else core.drafter.weights.tensors()
    return dict(zip(tensors, tensor_checksums(list(tensors.values())), strict=True))
