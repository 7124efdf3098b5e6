"""ServerWeights sends pushes to one server, and keeps the weights that a new server must get."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from uuid import uuid4

import torch

from rollout.sglang_engine.client import ServerGone, ServerRefused
from rollout.sglang_engine.delivery import NUM_ROWS, Delivery, Sums, Weights, picked_names, read_back
from rollout.sglang_engine.direct import Direct, DirectStaging
from rollout.sglang_engine.kept_server import KeptServer, ServerUnfit
from rollout.sglang_engine.staging import ServerStaging, expected_shapes
from rollout.sglang_engine.stale import Served, stale_tensors
from slime_spec.checkpoints.model_files import DraftFiles, TargetFiles
from slime_spec.config.tree import Config
from slime_spec.errors import PushError
from slime_spec.transports.kept import PushedTensors
from slime_spec.weights.messages import NOT_COMPARABLE, Manifest, PauseMode, Side
from slime_spec.weights.receive import PushStage

# Tensors whose storage a draft may share with its target: a push of the target changes them, and a release loses them.
SHARED = ("embed_tokens", "lm_head", "shared_head.head")


@dataclass(frozen=True)
class Outcome:
    """Says how a push that was sent to the server ended.

    ``loss`` says why the server must be replaced, empty where it serves on; ``refusal`` is the error that ends the
    push, whose weights are then not kept.
    """

    loss: str = ""
    refusal: PushError | None = None


class ServerWeights:
    """Keeps the weights that were last pushed and sends them to the server, and to a server that replaces it.

    A draft that is pushed while speculation is disabled is kept and not sent. Used by one thread at a time.
    """

    delivery: Delivery  # known once the server has reported its contract
    direct: Direct | None = None  # where pushes go straight to the server

    def __init__(
        self,
        config: Config,
        engine_index: int,
        files: tuple[TargetFiles, DraftFiles | None],
        server: KeptServer,
        run: str = "",
    ) -> None:
        self._config, self._index, self._server = config, engine_index, server
        self._target, self._draft = files
        self._current: dict[Side, Weights] = {}
        self._checksums: dict[Side, str] = {}
        self._pushed: Mapping[str, int] = {}  # the target's
        self._served: Served | None = None  # as it was when it was last looked at
        self._draft_sums: Sums = {}
        self._paused: PauseMode | None = None
        # A server that outlives its run keeps what it has cached, and the next run has the same version numbers.
        self._run = run or uuid4().hex
        self._key = f"{self._run}-0"
        self._pause = ""
        self._partial: Side | None = None  # the side of which the server has a part of a push

    def version(self, side: Side) -> int:
        """Return the version of the side's last push; 0 for the checkpoint's weights."""
        weights = self._current.get(side)
        return 0 if weights is None else weights.version

    @property
    def draft_version(self) -> int | None:
        """Return the draft's version; None where the server has no draft with weights."""
        return None if self._draft is None or not self._server.speculates else self.version("draft")

    @property
    def cache_key(self) -> str:
        """Return the key for prefixes that the server caches: no other weights, of this run or another, have it.

        Engines of one run have the same key for the same push, as one router may send their requests to any server.
        A request that comes while the server is paused may be computed with weights yet to come: a pause has its own.
        """
        return f"{self._key}-{self._pause}" if self._pause else self._key

    @property
    def is_paused(self) -> bool:
        """Return whether a push has paused the server."""
        return self._paused is not None

    def staging(self, manifest: Manifest, replace: Callable[[str], None]) -> ServerStaging | DirectStaging:
        """Return where a push is collected; ``replace`` replaces a server that has a part of a push."""
        self.delivery.check(manifest.side)
        expected = expected_shapes(manifest, self._target, self._draft)
        if self.direct is None:
            return ServerStaging(expected)

        def give_up(why: str) -> None:
            self._partial = manifest.side
            replace(why)

        return DirectStaging(manifest, expected, self.direct, self._mtp_names, self._paused, give_up)

    def pause(self, mode: PauseMode) -> None:
        self._server.loop.call(self._server.client.post("/pause_generation", {"mode": mode}))
        self._paused, self._pause = mode, uuid4().hex

    def resume(self) -> None:
        if self._partial is not None:
            raise PushError(f"{self._server.client.url} has a part of a push of its {self._partial}, and stays paused")
        self._server.loop.call(self._server.client.post("/continue_generation"))
        self._paused, self._pause = None, ""

    def restore(self) -> None:
        """Send the current weights to a new server, which has its checkpoints' weights."""
        self._paused, self._pause, self._partial = None, "", None
        if self.direct is not None:
            self.direct.way.forget(is_replaced=True)
        for side in ("target", "draft"):
            if side in self._current:
                self._deliver(self._current[side])

    def send_checkpoint(self, weights: Weights) -> None:
        """Deliver a checkpoint's weights to an external server; a draft is kept, to be sent again if it is lost."""
        self._deliver(weights)
        if weights.side == "draft":
            self._current["draft"] = weights

    @property
    def has_pushed_draft(self) -> bool:
        """Return whether a draft was ever pushed; if not, a new server gets the draft from its folder."""
        return "draft" in self._current

    @property
    def knows_draft_sums(self) -> bool:
        return bool(self._draft_sums)

    def send_draft_again(self) -> None:
        """Deliver the draft that was last pushed; raises ServerUnfit where the server refuses what it took before."""
        try:
            self._deliver(self._current["draft"])
        except ServerRefused as error:
            raise ServerUnfit(f"it refused the draft that it had taken: {error}") from error

    def remember_draft(self) -> None:
        """Note the checksums of the draft, which is right now."""
        self._draft_sums = self._sums_of_draft()

    def draft_is_as_remembered(self) -> bool:
        """Compare the draft with its checksums when it was right; True where there are none, then or now."""
        sums = self._sums_of_draft()
        return not (sums and self._draft_sums) or sums == self._draft_sums

    def _sums_of_draft(self) -> Sums:
        """Return the checksums of the tensors that are the draft's own."""
        sums = self._server.loop.call(self.delivery.checksums("draft"))
        return {name: checksum for name, checksum in sums.items() if not any(part in name for part in SHARED)}

    def send(self, stage: PushStage[ServerStaging | DirectStaging]) -> Outcome:
        """Keep the push and deliver it, unless the server has loaded it already.

        Where the server dies of it, ``restore`` sends it to the next server.
        """
        side, version = stage.manifest.side, stage.manifest.version
        before = self._current.get(side)
        self._current[side] = Weights(side, version, stage.staging.tensors)
        if side == "target":
            self._key = f"{self._run}-{version}-{stage.checksum}"
        try:
            if isinstance(stage.staging, DirectStaging):
                stage.staging.take_over()
                self._partial = None if self._partial == side else self._partial
            else:
                self._deliver(self._current[side])
        except ServerGone as error:
            return Outcome(f"it died during the push of {side} version {version}: {error}")
        except ServerRefused as error:
            # The server may have loaded a part of the push: a new server gets the weights from before the push.
            if before is None:
                del self._current[side]
            else:
                self._current[side] = before
            refusal = PushError(f"engine {self._index}: {error}")
            return Outcome(f"it refused the push of {side} version {version}: {error}", refusal)
        return Outcome()

    def confirm(self, stage: PushStage[ServerStaging | DirectStaging]) -> None:
        """Note the checksums of a push that the server has; raises ServerUnfit where it reports another version."""
        side = stage.manifest.side
        self._checksums[side] = stage.checksum
        if side == "target":
            self._pushed = dict(stage.checksums)
            self._check_version()
        has_mtp = bool(self._target.mtp_shapes.keys() & stage.staging.tensors.keys())
        if self._server.speculates and (side == "draft" or has_mtp):
            self.remember_draft()

    def _moved(self) -> str:
        """Return the target's pushed checksum where the server's tensors moved with it; see ``checksum``."""
        before, self._served = self._served, None
        if self._server.info.flags.get("quantization") or not (
            sums := self._server.loop.call(self.delivery.checksums("target"))
        ):
            return NOT_COMPARABLE  # what is rounded may stay as it was
        self._served = Served(self._pushed, sums)
        stale = None if before is None else stale_tensors(before, self._served)
        if stale:
            return f"the server has the old values of {', '.join(sorted(stale)[:3])} ({len(stale)} tensors)"
        return NOT_COMPARABLE if stale is None else self._checksums["target"]

    def _deliver(self, weights: Weights) -> None:
        if weights.side == "draft" and not self._server.speculates:
            return
        here = replace(weights, tensors=dict(weights.tensors))  # fetched from the trainer's ranks, where they have them
        self._server.loop.call(self.delivery.deliver(here, self._mtp_names, self._paused))

    @property
    def _mtp_names(self) -> frozenset[str]:
        return frozenset(self._target.mtp_shapes if self._server.speculates else ())

    def _check_version(self) -> None:
        told = self._server.loop.call(self.delivery.version())
        if told != str(self.version("target")):
            raise ServerUnfit(f"after the push of version {self.version('target')} the server reports version {told!r}")

    def checksum(self, side: Side) -> str:
        """Return the pushed checksum where the server has the pushed weights, else what is wrong, or NOT_COMPARABLE.

        SGLang keeps projections fused and has no way to read all of them back: the first rows of some tensors are
        compared as numbers. Of most families it shows nothing: the server's checksums must then differ, from the second
        push on, where the push does. Those of the draft are compared with those right after the push.
        """
        weights = self._current.get(side)
        if weights is None:
            return "nothing was pushed"
        if side == "target":
            dtype: torch.dtype = getattr(torch, self._config.engine.dtype)
            tensors = weights.tensors
            if isinstance(tensors, PushedTensors):  # fetched here: the loop below must not wait for the trainer
                heads = tensors.heads(NUM_ROWS)
                tensors = {name: heads[name] for name in picked_names(heads)}
            judged = self._server.loop.call(read_back(self._server.client, tensors, dtype))
            if not judged:
                return self._moved()
            if wrong := [name for name, is_same in judged.items() if not is_same]:
                return f"the server has other values of {', '.join(wrong)}"
        else:
            sums = self._sums_of_draft() if self._server.speculates else {}
            if not sums or not self._draft_sums:  # no draft runs, or the server does not report them
                return NOT_COMPARABLE
            if sums != self._draft_sums:
                return "the draft's checksums have changed since the push"
        return self._checksums[side]
