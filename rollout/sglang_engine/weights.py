"""What one server computes with: pushes on their way to it, and what a new server must be brought to."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rollout.sglang_engine.client import ServerGone, ServerRefused, SglangClient
from rollout.sglang_engine.delivery import Delivery, Sums, Weights, read_back
from rollout.sglang_engine.loop_thread import AsyncLoop
from rollout.sglang_engine.staging import ServerStaging
from slime_spec.checkpoints.model_files import DraftFiles, TargetFiles
from slime_spec.config.tree import Config
from slime_spec.errors import PushError
from slime_spec.weights.manifest import Manifest, Side
from slime_spec.weights.push import NOT_COMPARABLE, PauseMode
from slime_spec.weights.stage import PushStage

# Tensors whose storage a draft may share with its target: a push of the target changes them, and a release loses them.
SHARED = ("embed_tokens", "lm_head", "shared_head.head")


class ServerWeights:
    """The engine's half of pushes. It keeps what was last pushed: a server that dies is brought back to it.

    ``replace_server`` restarts the server and calls ``restore``; ``changed`` is called after a push, once the server
    generates again. ``speculates`` says whether the server has a draft at all: one that is pushed to a server whose
    speculation was given up is only kept. Used by one thread at a time.
    """

    delivery: Delivery  # known once the server has said what it can do

    def __init__(
        self,
        config: Config,
        engine_index: int,
        files: tuple[TargetFiles, DraftFiles | None],
        client: SglangClient,
        loop: AsyncLoop,
        replace_server: Callable[[str], None],
        changed: Callable[[], None],
        speculates: Callable[[], bool],
    ) -> None:
        self._config, self._index = config, engine_index
        self._target, self._draft = files
        self._client, self._loop = client, loop
        self._replace_server, self._changed, self._speculates = replace_server, changed, speculates
        self._current: dict[Side, Weights] = {}
        self._checksums: dict[Side, str] = {}
        self._draft_sums: Sums = {}
        self._paused: PauseMode | None = None
        self._is_dirty = False

    def version(self, side: Side) -> int:
        """Of the last push; 0 for what the checkpoint had."""
        weights = self._current.get(side)
        return 0 if weights is None else weights.version

    def staging(self, manifest: Manifest) -> ServerStaging:
        self.delivery.check(manifest.side)
        return ServerStaging(manifest, self._target, self._draft)

    def pause(self, mode: PauseMode) -> None:
        self._loop.call(self._client.post("/pause_generation", {"mode": mode}))
        self._paused = mode

    def resume(self) -> None:
        self._loop.call(self._client.post("/continue_generation"))
        self._paused = None
        self._tell_changed()

    def restore(self) -> None:
        """Bring a new server, which has its checkpoints' weights, to the current ones."""
        self._paused = None
        for side in ("target", "draft"):
            if side in self._current:
                self._deliver(self._current[side])

    @property
    def can_mend_draft(self) -> bool:
        """Not where the checksums say that the server still has the draft of its folder, and none was pushed."""
        return "draft" in self._current or not self._draft_sums

    def send_draft_again(self) -> bool:
        """False where no draft was ever pushed: only a new server has it then."""
        if "draft" not in self._current:
            return False
        self._deliver(self._current["draft"])
        return True

    def remember_draft(self) -> None:
        """Note the draft's checksums, as they are when all is well."""
        self._draft_sums = self._sums_of_draft()

    def draft_is_as_remembered(self) -> bool:
        return self._sums_of_draft() == self._draft_sums

    def _sums_of_draft(self) -> Sums:
        """Of what is the draft's own."""
        sums = self._loop.call(self.delivery.checksums("draft"))
        return {name: checksum for name, checksum in sums.items() if not any(part in name for part in SHARED)}

    def commit(self, stage: PushStage[ServerStaging]) -> None:
        """Bring the server to the push; one that dies of it is restarted, with it."""
        side, version = stage.manifest.side, stage.manifest.version
        before = self._current.get(side)
        self._current[side] = Weights(side, version, stage.staging.tensors)
        try:
            self._deliver(self._current[side])
        except ServerGone as error:
            self._replace_server(f"it died during the push of {side} version {version}: {error}")
        except ServerRefused as error:
            # It may have loaded some of it: a new server, with what it had.
            if before is None:
                del self._current[side]
            else:
                self._current[side] = before
            self._replace_server(f"it refused the push of {side} version {version}: {error}")
            raise PushError(f"engine {self._index}: {error}") from error
        self._checksums[side] = stage.checksum
        if side == "target":
            self._check_version()
        if self._speculates() and (side == "draft" or self._target.mtp_shapes.keys() & stage.staging.tensors.keys()):
            self.remember_draft()
        self._is_dirty = True
        if self._paused is None:
            self._tell_changed()

    def _deliver(self, weights: Weights) -> None:
        if weights.side == "draft" and not self._speculates():
            return
        mtp_names = frozenset(self._target.mtp_shapes if self._speculates() else ())
        self._loop.call(self.delivery.deliver(weights, mtp_names, self._paused))

    def _tell_changed(self) -> None:
        dirty, self._is_dirty = self._is_dirty, False
        if dirty:
            self._changed()

    def _check_version(self) -> None:
        told = self._loop.call(self.delivery.version())
        if told != str(self.version("target")):
            raise PushError(f"after the push of version {self.version('target')} the server tells version {told!r}")

    def checksum(self, side: Side) -> str:
        """The pushed checksum where the server's weights are what was pushed, else what is wrong, or NOT_COMPARABLE.

        SGLang keeps projections fused and has no way to read all of them back: the first rows of some tensors are
        compared as numbers, and the draft's checksums by the server's reckoning with those right after the push.
        """
        weights = self._current.get(side)
        if weights is None:
            return "nothing was pushed"
        if side == "target":
            dtype: torch.dtype = getattr(torch, self._config.engine.dtype)
            judged = self._loop.call(read_back(self._client, weights.tensors, dtype))
            if not judged:
                return NOT_COMPARABLE
            if wrong := [name for name, is_same in judged.items() if not is_same]:
                return f"the server has other values of {', '.join(wrong)}"
        else:
            sums = self._sums_of_draft() if self._speculates() else {}
            if not sums:  # no draft runs, or the server tells none
                return NOT_COMPARABLE
            if sums != self._draft_sums:
                return "the draft's checksums have changed since the push"
        return self._checksums[side]
