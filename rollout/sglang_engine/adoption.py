"""Before its first sample an external server is brought to the run's checkpoints, or proved to have the policy's.

    a run that trains    pushes the policy, as version 0: it owns the server's weights from then on
    rollout only         reads rows of the policy back, and refuses a server that has others, or shows none

The draft is pushed in either run. A draft that was pushed by somebody else would bend nothing; it would only be slow.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from rollout.sglang_engine.client import ServerGone, ServerRefused
from rollout.sglang_engine.delivery import Weights, is_read_right, read_back, shown_rows
from rollout.sglang_engine.kept_server import KeptServer
from rollout.sglang_engine.weights import ServerWeights
from slime_spec.checkpoints.draft_location import locate_draft
from slime_spec.checkpoints.families.eagle3 import TABLES
from slime_spec.checkpoints.model_files import TargetFiles
from slime_spec.checkpoints.tensors import stored_tensors
from slime_spec.config.server_checks import ADDRESSES
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError, PushError
from slime_spec.sglang.labels import UNNAMED, label_suffix
from slime_spec.weights.together import in_order

logger = logging.getLogger(__name__)

NUM_PROVED = (
    24  # tensors whose first rows are read back: in bfloat16 a step of training leaves most numbers as they were
)
OWN_SERVERS = "Leave out --rollout-external-engine-addrs: this run then starts servers of its own."
Tensors = Mapping[str, torch.Tensor]


class Adoption:
    """Adopts one engine's external server; raises ConfigError where the server is not what the run needs."""

    def __init__(
        self, config: Config, engine_index: int, target: TargetFiles, server: KeptServer, weights: ServerWeights
    ) -> None:
        self._config, self._target, self._server, self._weights = config, target, server, weights
        self._url, self._label = server.client.url, f"0{label_suffix(config, engine_index)}"

    def run(self) -> None:
        try:
            if self._config.run.mode == "rollout_only":
                self._prove_target()
                self._server.loop.call(self._name_weights())
            else:
                self._push_target()
            self._push_draft()
        except (ServerGone, ServerRefused) as error:
            raise ConfigError(
                ADDRESSES, f"must take the run's weights: {error}", self._url, "Look in its log, and start it anew."
            ) from None

    def _push_target(self) -> None:
        policy = self._policy()
        rows = self._server.loop.call(shown_rows(self._server.client, policy, NUM_PROVED))
        for name, replicas in rows.items():
            if any(theirs.shape != policy[name][:2].shape for theirs in replicas):
                raise self._other_model(f"{name} has rows of {tuple(replicas[0].shape[1:])} numbers there")
        names = {*self._target.shapes, *(self._target.mtp_shapes if self._draft_is_inside else ())}
        whole = in_order(dict(stored_tensors(self._config.model.hf_checkpoint, names.__contains__)))
        self._weights.send_checkpoint(Weights("target", 0, whole))

    def _prove_target(self) -> None:
        dtype: torch.dtype = getattr(torch, self._config.engine.dtype)
        judged = self._server.loop.call(read_back(self._server.client, self._policy(), dtype, NUM_PROVED))
        if wrong := [name for name, is_same in judged.items() if not is_same]:
            raise self._other_model(f"it has other values of {', '.join(wrong[:3])}")
        if not judged:
            raise ConfigError(
                ADDRESSES,
                "must show that it has the policy's weights, as rollouts alone push none: this SGLang reads no weights "
                f"of a {self._target.architecture} back",
                self._url,
                OWN_SERVERS,
            )
        logger.info("the external server has the policy's weights tensors_read=%d server=%s", len(judged), self._url)

    def _other_model(self, how: str) -> ConfigError:
        return ConfigError(
            ADDRESSES,
            f"must have the weights of --hf-checkpoint, and {how}",
            self._url,
            f"Start it anew with --model-path {self._config.model.hf_checkpoint} (an earlier run may have pushed to "
            f"it). Or: {OWN_SERVERS}",
        )

    async def _name_weights(self) -> None:
        """Have the server call the weights version 0, whatever an earlier run called its last."""
        client = self._server.client
        told = (await client.get("/model_info")).get("weight_version")
        if told in (None, UNNAMED, "0") and self._label == "0":
            return
        try:
            await client.post("/update_weight_version", {"new_version": self._label, "abort_all_requests": False})
        except ServerRefused as error:
            raise ConfigError(
                ADDRESSES,
                f"must call its weights version {self._label}, not {told!r}: {error}",
                self._url,
                "Start that server anew; for a router, with a newer SGLang.",
            ) from None

    def _push_draft(self) -> None:
        """Push the draft of its folder, where the server takes drafts; a run that trains has pushed one inside."""
        draft = locate_draft(self._config.speculative, self._config.model.hf_checkpoint)
        is_pushed = self._draft_is_inside and self._config.run.mode != "rollout_only"
        if draft is None or is_pushed:
            return
        inside = draft.kind == "in_target"
        try:
            self._weights.delivery.check("draft")
        except PushError as error:
            logger.warning("the draft of an external server is what that has loaded server=%s: %s", self._url, error)
            return
        wants = self._target.mtp_shapes.__contains__ if inside else lambda name: name not in TABLES
        tensors = in_order(dict(stored_tensors(draft.folder, wants)))
        self._weights.send_checkpoint(Weights("draft", 0, tensors))

    @property
    def _draft_is_inside(self) -> bool:
        draft = locate_draft(self._config.speculative, self._config.model.hf_checkpoint)
        return draft is not None and draft.kind == "in_target"

    def _policy(self) -> Tensors:
        """Return the tensors of the policy that rows are read back of: matrices, whose rows tell weights apart."""
        names = [name for name, shape in self._target.shapes.items() if len(shape) > 1 and is_read_right(name)]
        picked = frozenset(names[:: max(1, len(names) // NUM_PROVED)])
        return dict(stored_tensors(self._config.model.hf_checkpoint, picked.__contains__))
