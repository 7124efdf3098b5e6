"""RankActor gives one trainer rank a Ray actor: a process, a network address and nothing else."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import ray

from slime_spec.config.tree import Config
from slime_spec.interfaces import RunState
from slime_spec.ports import free_port
from slime_spec.transports.ray_object_store import RayObjectStoreTransport
from slime_spec.types import TrainReport, TrainSample
from slime_spec.weights.messages import PushBucket

if TYPE_CHECKING:
    from trainer_bridge.megatron.rank import TrainerRank


class RankActor:
    """Runs one trainer rank in an actor; the group makes the class remote with the rank's resources."""

    def __init__(self, config: Config, rank: int) -> None:
        self.config, self.rank = config, rank
        self.transport = RayObjectStoreTransport()
        self.on_their_way: list[PushBucket] = []

    def address(self) -> str:
        """Return where the other ranks can meet this one."""
        return f"tcp://{ray.util.get_node_ip_address()}:{free_port('0.0.0.0')}"

    def load(self, init_method: str) -> RunState | None:
        # Imported here: the driver imports this module for its class, and must not pay for Megatron.
        from trainer_bridge.megatron.rank import TrainerRank

        self.worker: TrainerRank = TrainerRank(self.config, self.rank, init_method)
        return self.worker.load()

    def step(self, samples: Sequence[TrainSample]) -> TrainReport:
        return self.worker.step(samples)

    def push_buckets(self, version: int) -> Iterator[PushBucket]:
        # Ray does not count a reference that is nested in a streamed value, so it is held here until ``end_push``.
        for bucket in self.worker.push_buckets(version, self.transport):
            self.on_their_way.append(bucket)
            yield bucket

    def end_push(self) -> None:
        """Release the buckets' memory: every engine has every bucket, or the push failed."""
        self.on_their_way.clear()
        self.worker.end_push()

    def save(self, folder: str, state: RunState) -> None:
        self.worker.save(folder, state)

    def export_hf(self, folder: str) -> None:
        self.worker.export_hf(folder)

    def peak_rss_bytes(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
