"""SGLang's clients update weights from a folder at once, or as tensors inside a session.

begin_weight_update ── update_weights_from_tensor ── … ── end_weight_update
 (one may be open)        (held, not yet used)             (complete? then one push; the session is over either way)
"""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from rollout.embedded.engine import EmbeddedEngine
from rollout.embedded.http.serving import Serving
from slime_spec.checkpoints.draft_choice import ChosenDraft, choose_draft
from slime_spec.checkpoints.draft_tensors import load_draft
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import expected_shapes, load_tensors
from slime_spec.config.tree import Config
from slime_spec.errors import CheckpointError, ConfigError, PushError
from slime_spec.transports.in_process import InProcessTransport
from slime_spec.weights.messages import Side, meta_of
from slime_spec.weights.receive import PushReceiver, check_part, check_values
from slime_spec.weights.run import manifest_of, push_messages, run_push

ANEW = "Restart the server with this draft."
ONE_BUCKET = sys.maxsize  # bytes: nothing travels, so nothing is gained by sending parts
SELECTORS = ("target", "draft", "all")
# Of a ModelSpec, what shapes do not show.
SAME_IN_A_MODEL = (
    *("architecture", "num_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling"),
    *("rotary_dim", "latent", "experts"),
)
SIDES: Mapping[str, tuple[Side, ...]] = {"target": ("target",), "draft": ("draft",), "all": ("target", "draft")}
Tensors = MutableMapping[str, torch.Tensor]


class DraftFolders:
    """Reads checkpoints of the kind of the served draft; a reduced vocabulary is fixed when serving starts."""

    def __init__(self, config: Config, target: ModelSpec) -> None:
        self._config, self._target = config, target
        self._served = choose_draft(config, target)
        self._hot_token_ids = None if self._served is None else _read(self._served)[1]

    def read(self, folder: str) -> Tensors:
        """Return the draft's weights; raises CheckpointError for a draft of another kind, naming what differs."""
        speculative = replace(self._config.speculative, draft_model_path=folder)
        draft = choose_draft(replace(self._config, speculative=speculative), self._target)
        assert draft is not None, "asked only where a draft is served"
        assert self._served is not None, "asked only where a draft is served"
        if draft.spec != self._served.spec:
            served, found = vars(self._served.spec), vars(draft.spec)
            name = next(name for name in found if found[name] != served.get(name))
            raise CheckpointError(
                f"{folder}: {name}", f"must be {served.get(name)!r} as in the draft being served", found[name], ANEW
            )
        tensors, hot_token_ids = _read(draft)
        if not _same_ids(hot_token_ids, self._hot_token_ids):
            raise CheckpointError(f"{folder}: d2t", "must be that of the draft being served", "another", ANEW)
        return tensors


def _read(draft: ChosenDraft) -> tuple[Tensors, torch.Tensor | None]:
    """Return the weights under the names of a push, and the target ids of a reduced vocabulary."""
    if isinstance(draft.spec, ModelSpec):
        return load_tensors(draft.folder, draft.spec), None
    checkpoint = load_draft(draft.folder, draft.spec)
    return checkpoint.tensors, checkpoint.hot_token_ids


def _same_ids(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return torch.equal(ours, theirs)


def decoded(encoded: Sequence[str]) -> Tensors:
    """Return a payload's tensors: one safetensors file in base64 (SGLang sends one entry per tensor parallel rank)."""
    name, remedy = "serialized_named_tensors", "Send [base64 of safetensors.torch.save(tensors)]."
    if len(encoded) != 1:
        raise ConfigError(name, "must have one entry: this engine has one rank", len(encoded), remedy)
    try:
        return load_safetensors(base64.b64decode(encoded[0], validate=True))
    except (ValueError, SafetensorError) as error:  # a ValueError: no base64
        raise ConfigError(name, f"must be base64 of a safetensors file: {error}", "?", remedy) from None
    except KeyError as error:
        raise ConfigError(name, f"must hold tensors of a dtype that torch has, not {error}", "?", remedy) from None


def push_tensors(engine: EmbeddedEngine, side: Side, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Make the engine use ``tensors``; after a PushError the engine is still on its old version."""
    messages = push_messages(tensors, version, side, ONE_BUCKET, InProcessTransport())
    run_push(messages, lambda message: [engine.update_weights(message)])


@dataclass
class Session:
    """Holds the sides and tensors of an open session, and why one of its payloads was refused, if one was."""

    sides: tuple[Side, ...]
    version_name: str | None = None
    refusal: str = ""
    tensors: dict[Side, Tensors] = field(default_factory=dict)


class WeightUpdates:
    """Makes the weight updates of one server; only the control thread calls it."""

    def __init__(self, serving: Serving) -> None:
        self._engine, self._spec, self._names = serving.engine, serving.spec, serving.names
        self._drafts = DraftFolders(serving.config, serving.spec)
        self._dtype: torch.dtype = getattr(torch, serving.config.engine.dtype)
        self._session: Session | None = None

    def begin(self, selector: str) -> None:
        if self._session is not None:
            raise PushError("a weight-update session is already open; call end_weight_update() first")
        self._session = Session(self._sides(selector))

    def add(self, encoded: Sequence[str], selector: str | None, version_name: str | None) -> None:
        """Hold a payload's tensors for the end of the session; without a selector they are the target's, if it has any.

        A payload is held whole or refused, so a session never holds more than the model's own tensors.
        """
        session = self._session
        if session is None:
            raise PushError("update_weights_from_tensor must run between begin_weight_update() and end_weight_update()")
        sides = session.sides[:1] if selector is None else self._sides(selector)
        if beyond := [side for side in sides if side not in session.sides]:
            raise PushError(f"the session was opened for {session.sides[0]} weights only, not for {beyond[0]}")
        try:
            parts = self._divided(decoded(encoded), sides)
            for side, own in parts.items():
                self._check(side, own, session.tensors.get(side, {}))
        except (ConfigError, PushError) as error:
            session.refusal = str(error)
            raise
        for side, own in parts.items():
            session.tensors.setdefault(side, {}).update(own)
        session.version_name = version_name or session.version_name

    def end(self) -> None:
        """Push what the session holds. The session is over whatever happens; without tensors nothing else does."""
        session, self._session = self._session, None
        if session is None:
            raise PushError("no weight-update session is open; call begin_weight_update() first")
        if session.refusal:
            raise PushError(f"the session is dropped, for a payload of it was refused: {session.refusal}")
        self._push(session.tensors, session.version_name)

    def from_disk(self, folder: str, selector: str, version_name: str | None) -> None:
        """Use the weights of a checkpoint folder from the next round on."""
        sides = self._sides(selector)
        if not os.path.isdir(folder):  # False too for a path that is too long or holds a NUL byte
            raise ConfigError("model_path", "must be a checkpoint folder", folder, "Send the path of a folder.")
        tensors: dict[Side, Tensors] = {}
        if "target" in sides:
            self._check_same_model(folder)
            tensors["target"] = load_tensors(folder, self._spec)
        if "draft" in sides:
            tensors["draft"] = self._drafts.read(folder)
        self._push(tensors, version_name)

    def rename(self, version_name: str) -> None:
        """Give the weights in use another version name."""
        self._names.give(self._engine.weight_version, version_name)

    def _push(self, tensors: Mapping[Side, Tensors], version_name: str | None) -> None:
        for side, own in tensors.items():  # all of it before any of it, for two sides are two pushes
            PushReceiver(manifest_of(side, 0, own), dict(self._expected(side)))
            self._check(side, own, {})
        for side, own in tensors.items():
            if side == "draft":
                push_tensors(self._engine, side, self._engine.draft_version + 1, own)
                continue
            version = self._engine.weight_version + 1
            self._names.give(version, version_name or self._names.current())  # as SGLang: without one the old one stays
            push_tensors(self._engine, side, version, own)

    def _check(self, side: Side, tensors: Tensors, held: Tensors) -> None:
        """Raise PushError, naming the tensor, for tensors that a push of this side could not have; ``held`` it has."""
        check_part([meta_of(name, tensor) for name, tensor in tensors.items()], self._expected(side))
        for name in tensors:
            if name in held:
                raise PushError(f"{name} came twice in this session")
        check_values(list(tensors), list(tensors.values()), self._dtype)

    def _expected(self, side: Side) -> Mapping[str, tuple[int, ...]]:
        return expected_shapes(self._spec) if side == "target" else self._engine.draft_shapes

    def _sides(self, selector: str) -> tuple[Side, ...]:
        if self._engine.draft_shapes:
            return SIDES[selector]
        if selector == "draft":
            raise ConfigError("selector", "this server's drafter has no weights", selector, "Send selector target.")
        return ("target",)

    def _divided(self, tensors: Tensors, sides: tuple[Side, ...]) -> dict[Side, Tensors]:
        """Return each side's share of a payload.

        A target's payload may hold the heads that its drafter drafts with (MTP).
        """
        target, draft = expected_shapes(self._spec), self._engine.draft_shapes
        if sides == ("draft",):
            return {"draft": tensors}
        tensors = self._without_tied_head(tensors)
        own = {name: tensor for name, tensor in tensors.items() if name in target or name not in draft}
        if sides == ("target",):
            return {"target": own}
        return {"target": own, "draft": {name: tensor for name, tensor in tensors.items() if name in draft}}

    def _without_tied_head(self, tensors: Tensors) -> Tensors:
        """Drop a tied head, which transformers lists beside its embedding: as a head of its own it would be lost."""
        head = "lm_head.weight"
        if head not in tensors or not self._spec.tie_word_embeddings:
            return tensors
        embedding = tensors.get("model.embed_tokens.weight")
        if embedding is None or embedding.dtype != tensors[head].dtype or not torch.equal(embedding, tensors[head]):
            raise PushError(f"{head} must come with the embedding it is tied to, and be equal to it")
        return {name: tensor for name, tensor in tensors.items() if name != head}

    def _check_same_model(self, folder: str) -> None:
        """Refuse another model: shapes show by name, but another rope or norm would load and compute other results."""
        found = ModelSpec.from_folder(folder)
        for name in SAME_IN_A_MODEL:
            if (theirs := getattr(found, name)) != (ours := getattr(self._spec, name)):
                raise CheckpointError(
                    f"{folder}: {name}", f"must be {ours!r} as in the model being served", theirs, "Serve it anew."
                )
