"""RankActor gives one trainer rank a Ray actor: a process, a network address and nothing else."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError

from slime_spec.config.tree import Config
from slime_spec.errors import PushError
from slime_spec.garbage import no_collection
from slime_spec.interfaces import RunState
from slime_spec.ports import free_port
from slime_spec.ray_errors import result_of
from slime_spec.transports.choice import every_rank_publishes, make_transport
from slime_spec.transports.kept import Packed, packed_for_ray, unpacked_from_ray
from slime_spec.transports.to_servers import ServerRoute, ToServers
from slime_spec.types import TrainReport, TrainSample
from slime_spec.weights.messages import Opening, PushBucket, Side

if TYPE_CHECKING:
    from trainer_bridge.megatron.rank import TrainerRank


KEPT_TIMEOUT_S = 600.0  # the rank may be in a step, and gives out what it has kept after it


class RankSource:
    """Implements Source in an engine's process: a rank's actor has the weights."""

    def __init__(self, rank: ray.actor.ActorHandle) -> None:
        self._rank = rank

    def fetch(self, push: str, names: Sequence[str], num_rows: int | None) -> dict[str, torch.Tensor]:
        try:
            kept: Packed = result_of(self._rank.kept.remote(push, names, num_rows), KEPT_TIMEOUT_S)
        except (GetTimeoutError, RayActorError) as error:
            raise PushError(f"the trainer's rank does not give out the weights that it has kept: {error}") from error
        return unpacked_from_ray(kept)


class RankActor:
    """Runs one trainer rank in an actor; the group makes the class remote with the rank's resources."""

    def __init__(self, config: Config, rank: int) -> None:
        self.config, self.rank = config, rank
        self.transport = make_transport(config)
        self.buckets: Iterator[PushBucket | None] | None = None

    def address(self) -> str:
        """Return where the other ranks can meet this one."""
        return f"tcp://{ray.util.get_node_ip_address()}:{free_port('0.0.0.0')}"

    def load(self, init_method: str) -> RunState | None:
        # Imported here: the driver imports this module for its class, and must not pay for Megatron.
        with no_collection():
            from trainer_bridge.megatron.rank import TrainerRank

        self.worker: TrainerRank = TrainerRank(self.config, self.rank, init_method)
        return self.worker.load()

    def step(self, samples: Sequence[TrainSample], learns_draft: bool) -> TrainReport:
        return self.worker.step(samples, learns_draft)

    def open_push(self, opening: Opening) -> Any:
        """Get the transport ready; returns what the engines must know of it."""
        route = self.transport.open(ray.util.get_node_ip_address(), opening)
        if isinstance(route, ServerRoute):
            return replace(route, source=RankSource(ray.get_runtime_context().current_actor))
        return route

    def kept(self, push: str, names: Sequence[str], num_rows: int | None) -> Packed:
        """Do what Source says of ``fetch``, for RankSource to unpack."""
        assert isinstance(self.transport, ToServers), "named by a route to servers"
        return packed_for_ray(self.transport.kept.fetch(push, names, num_rows))

    def next_bucket(self, version: int, side: Side) -> PushBucket | None:
        """Make the next bucket of the push; None where there are no more, or another rank publishes them."""
        if self.buckets is None:
            every_rank = every_rank_publishes(self.config)
            self.buckets = self.worker.push_buckets(version, self.transport, every_rank, side)
        return next(self.buckets, None)

    def end_push(self) -> None:
        """Release the buckets' memory: every engine has every bucket, or the push failed."""
        self.buckets = None
        self.transport.close()
        self.worker.end_push()

    def save(self, folder: str, state: RunState) -> None:
        self.worker.save(folder, state)

    def export_hf(self, folder: str, draft_folder: str | None) -> None:
        self.worker.export_hf(folder, draft_folder)

    def peak_rss_bytes(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
