"""Weight updates as SGLang's clients make them: from a folder at once, or as tensors inside a session.

begin_weight_update ── update_weights_from_tensor ── … ── end_weight_update
 (one may be open)        (held, not yet used)             (complete? then one push; the session is over either way)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from rollout.embedded.http.draft_folder import DraftFolders
from rollout.embedded.http.fields import bad_field
from rollout.embedded.http.pushes import check_complete, push_tensors
from rollout.embedded.http.serving import Serving
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import expected_shapes, load_tensors
from slime_spec.errors import CheckpointError, PushError
from slime_spec.weights.messages import Side

SELECTORS = ("target", "draft", "all")
SIDES: Mapping[str, tuple[Side, ...]] = {"target": ("target",), "draft": ("draft",), "all": ("target", "draft")}
Tensors = dict[str, torch.Tensor]


@dataclass
class Session:
    """What an open session has been given so far."""

    sides: tuple[Side, ...]
    version_name: str | None = None
    tensors: dict[Side, Tensors] = field(default_factory=dict)


class WeightUpdates:
    """One thread calls it."""

    def __init__(self, serving: Serving) -> None:
        self._engine, self._spec, self._names = serving.engine, serving.spec, serving.names
        self._drafts = DraftFolders(serving.config, serving.spec)
        self._session: Session | None = None

    def begin(self, selector: str) -> None:
        if self._session is not None:
            raise PushError("a weight-update session is already open; call end_weight_update() first")
        self._session = Session(self._sides(selector))

    def add(self, tensors: Tensors, selector: str | None, version_name: str | None) -> None:
        """Hold tensors for the end of the session; without a selector they are the target's where it has any."""
        session = self._session
        if session is None:
            raise PushError("update_weights_from_tensor must run between begin_weight_update() and end_weight_update()")
        sides = session.sides[:1] if selector is None else self._sides(selector)
        if beyond := [side for side in sides if side not in session.sides]:
            raise PushError(f"the session was begun for {session.sides[0]} weights only, not for {beyond[0]}")
        for side, own in self._divided(tensors, sides).items():
            session.tensors.setdefault(side, {}).update(own)
        session.version_name = version_name or session.version_name

    def end(self) -> None:
        """Push what the session holds. The session is over whatever happens; without tensors nothing else does."""
        session, self._session = self._session, None
        if session is None:
            raise PushError("no weight-update session is open; call begin_weight_update() first")
        self._push(session.tensors, session.version_name)

    def from_disk(self, folder: str, selector: str, version_name: str | None) -> None:
        """Use the weights of a checkpoint folder from the next round on."""
        sides = self._sides(selector)
        tensors: dict[Side, Tensors] = {}
        if "target" in sides:
            self._check_same_model(folder)
            tensors["target"] = load_tensors(folder, self._spec)
        if "draft" in sides:
            tensors["draft"] = self._drafts.read(folder)
        self._push(tensors, version_name)

    def rename(self, version_name: str) -> None:
        """Give the weights in use another version name."""
        self._names.give(self._engine.stats().weight_version, version_name)

    def _push(self, tensors: Mapping[Side, Tensors], version_name: str | None) -> None:
        expected = {"target": expected_shapes(self._spec), "draft": self._engine.draft_shapes}
        for side, own in tensors.items():  # all of it before any of it, for two sides are two pushes
            check_complete(side, own, expected[side])
        for side, own in tensors.items():
            if side == "draft":
                push_tensors(self._engine, side, self._engine.draft_version + 1, own)
                continue
            version = self._engine.stats().weight_version + 1
            self._names.give(version, version_name or self._names.current())  # as SGLang: without one the old one stays
            push_tensors(self._engine, side, version, own)

    def _sides(self, selector: str) -> tuple[Side, ...]:
        if self._engine.draft_shapes:
            return SIDES[selector]
        if selector == "draft":
            raise bad_field("selector", "this server's drafter has no weights", selector, "Send selector target.")
        return ("target",)

    def _divided(self, tensors: Tensors, sides: tuple[Side, ...]) -> dict[Side, Tensors]:
        """Each side's share of a payload. A target's payload may hold the heads that its drafter drafts with (MTP)."""
        target, draft = expected_shapes(self._spec), self._engine.draft_shapes
        if sides == ("draft",):
            return {"draft": tensors}
        tensors = self._without_tied_head(tensors)
        own = {name: tensor for name, tensor in tensors.items() if name in target or name not in draft}
        if sides == ("target",):
            return {"target": own}
        return {"target": own, "draft": {name: tensor for name, tensor in tensors.items() if name in draft}}

    def _without_tied_head(self, tensors: Tensors) -> Tensors:
        """Transformers lists a tied head beside the embedding it is; as a head of its own it would be lost."""
        head = "lm_head.weight"
        if head not in tensors or not self._spec.tie_word_embeddings:
            return tensors
        embedding = tensors.get("model.embed_tokens.weight")
        if embedding is None or not torch.equal(embedding, tensors[head]):
            raise PushError(f"{head} must come with the embedding it is tied to, and be equal to it")
        return {name: tensor for name, tensor in tensors.items() if name != head}

    def _check_same_model(self, folder: str) -> None:
        """Other shapes are found by name; another rope or norm would load and compute something else."""
        found = ModelSpec.from_folder(folder)
        for name in ("architecture", "num_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling"):
            if (theirs := getattr(found, name)) != (ours := getattr(self._spec, name)):
                raise CheckpointError(
                    f"{folder}: {name}", f"must be {ours!r} as in the model being served", theirs, "Serve it anew."
                )
