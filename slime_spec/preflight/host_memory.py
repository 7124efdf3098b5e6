"""A node's host memory beside its GPUs: what trainer ranks keep there off their GPUs, pushes, and replayed experts.

Not counted: the processes themselves, pages of files that were read, samples without their experts, and what an
engine's node holds of a push while it reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slime_spec.checkpoints.parameters import layer_has_experts, num_experts
from slime_spec.config.tree import Config
from slime_spec.preflight.memory import MemoryPlan
from slime_spec.routed_experts import id_dtype
from slime_spec.transports.choice import OBJECT_STORE, transport_name


@dataclass(frozen=True)
class HostMemory:
    """Holds the memory of the node that needs most: ``trainer_bytes`` of its ``num_ranks``, and its share of pushes.

    A pipeline stage's first rank puts the stage's weights into Ray's object store of its node: ``push_bytes``, of all
    pushes that are kept at a time. With routing replay each of the node's ranks, the object store and the driver hold
    the experts of every sample of a step: ``replay_bytes``, where all samples have their greatest length.
    """

    num_nodes: int
    num_ranks: int
    trainer_bytes: int
    push_bytes: int
    replay_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.trainer_bytes + self.push_bytes + self.replay_bytes


def plan_host(config: Config, plan: MemoryPlan, target: Mapping[str, Any]) -> HostMemory | None:
    """Return the host memory of a node; None where no trainer has GPUs. ``target`` is the policy's config.json."""
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
    replayed = (num_ranks + 2) * _experts_bytes(config, target) if config.rollout.routing_replay else 0
    return HostMemory(num_nodes, num_ranks, num_ranks * of_rank, pushed, replayed)


def _experts_bytes(config: Config, target: Mapping[str, Any]) -> int:
    """Return the bytes of the experts that an engine chose for a step's samples (RoutedExperts)."""
    rollout = config.rollout
    num_layers = sum(layer_has_experts(target, layer) for layer in range(target["num_hidden_layers"]))
    of_token: int = num_layers * target["num_experts_per_tok"] * id_dtype(num_experts(target)).itemsize
    return rollout.batch_size * rollout.n_samples_per_prompt * (rollout.longest - 1) * of_token
