"""A node's host memory beside its GPUs: what trainer ranks keep there while they are off their GPUs, and pushes.

Not counted: the processes themselves, pages of files that were read, and what an engine's node holds of a push while it
reads.
"""

from __future__ import annotations

from dataclasses import dataclass

from slime_spec.config.tree import Config
from slime_spec.preflight.memory import MemoryPlan
from slime_spec.transports.choice import OBJECT_STORE, transport_name


@dataclass(frozen=True)
class HostMemory:
    """Holds the memory of the node that needs most: ``trainer_bytes`` of its ``num_ranks``, and its share of pushes.

    A pipeline stage's first rank puts the stage's weights into Ray's object store of its node: ``push_bytes``, of all
    pushes that are kept at a time.
    """

    num_nodes: int
    num_ranks: int
    trainer_bytes: int
    push_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.trainer_bytes + self.push_bytes


def plan_host(config: Config, plan: MemoryPlan) -> HostMemory | None:
    """Return the host memory of a node; None where no trainer has GPUs."""
    trainer = config.trainer
    if not plan.stages or not trainer.num_gpus:
        return None
    num_ranks = min(trainer.world_size, config.cluster.num_gpus_per_node)
    num_nodes = -(-trainer.world_size // num_ranks)
    of_rank = 0
    if config.trainer_leaves:
        of_rank = max(stage.host_bytes for stage in plan.stages)
    elif trainer.optimizer_cpu_offload:
        of_rank = max(stage.moment_bytes for stage in plan.stages)
    pushed = 0
    if plan.push_bytes is not None and transport_name(config) == OBJECT_STORE:
        num_stages = len(plan.stages)
        stages_on_node = -(-num_stages // num_nodes)
        pushed = plan.push_copies * plan.push_bytes * stages_on_node // num_stages
    return HostMemory(num_nodes, num_ranks, num_ranks * of_rank, pushed)
