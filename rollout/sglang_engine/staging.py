"""ServerStaging collects a push and checks it against the checkpoint; the server gets only complete pushes.

SGLang loads in place and dies of a tensor of the wrong shape, so nothing is sent that was not checked.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from slime_spec.checkpoints.draft_spec import OWN_EMBEDDING
from slime_spec.checkpoints.families.eagle3 import TABLES
from slime_spec.checkpoints.model_files import DraftFiles, Shapes, TargetFiles
from slime_spec.errors import PushError
from slime_spec.weights.messages import Manifest

# Names that SGLang and SpecForge read alike for an EAGLE-3 or EAGLE draft's one layer.
LAYER_NAMES = ("midlayer.", "layers.0.", "model.layers.0.")


class ServerStaging:
    """Collects the tensors for the server, as the transport holds them."""

    def __init__(self, expected: Shapes) -> None:
        self.expected = expected
        self.tensors: dict[str, torch.Tensor] = {}
        self._of_bucket: list[str] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.tensors[name] = tensor
        self._of_bucket.append(name)

    def keep(self) -> None:
        self.tensors |= {name: self.tensors[name].to("cpu", copy=True) for name in self._of_bucket}
        self._of_bucket.clear()

    def build(self) -> None:
        pass


def expected_shapes(manifest: Manifest, target: TargetFiles, draft: DraftFiles | None) -> Shapes:
    """Return the shapes of the tensors that a push of its side must bring; raises PushError."""
    return expected_target(manifest, target) if manifest.side == "target" else expected_draft(manifest, draft)


def expected_target(manifest: Manifest, target: TargetFiles) -> Shapes:
    """Return the shapes of the checkpoint's tensors, and of the MTP tensors that the push brings."""
    sent = {meta.name for meta in manifest.tensors}
    return {**target.shapes, **{name: shape for name, shape in target.mtp_shapes.items() if name in sent}}


def expected_draft(manifest: Manifest, draft: DraftFiles | None) -> Shapes:
    """Return the shapes of the draft's tensors, under the names that the push uses for its layer."""
    if draft is None:
        raise PushError("the drafter has no weights to update")
    sent = {meta.name for meta in manifest.tensors}
    if tables := sorted(sent & set(TABLES)):
        raise PushError(f"{', '.join(tables)} cannot be pushed: SGLang reads a draft's vocabulary once, at its start")
    if draft.in_target or sent == set(draft.shapes):
        return draft.shapes
    # A copy of the target's embedding, which drafts share, is in many files and is not trained.
    shapes = {name: shape for name, shape in draft.shapes.items() if name != OWN_EMBEDDING or name in sent}
    return _renamed(shapes, sent)


def _renamed(shapes: Shapes, sent: set[str]) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes with the layer's prefix that the push uses, if it uses one of the known ones."""
    theirs = next((prefix for prefix in LAYER_NAMES if any(name.startswith(prefix) for name in sent)), None)
    ours = next((prefix for prefix in LAYER_NAMES if any(name.startswith(prefix) for name in shapes)), None)
    if theirs is None or ours is None:
        return shapes
    return {theirs + name.removeprefix(ours) if name.startswith(ours) else name: shapes[name] for name in shapes}
