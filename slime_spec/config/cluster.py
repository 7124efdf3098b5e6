"""These settings say how the run uses Ray, and how trainer and engines share the machines."""

from __future__ import annotations

from dataclasses import dataclass

from slime_spec.config.setting import MACHINES, MAX_WAIT_S, setting


@dataclass(frozen=True)
class ClusterConfig:
    """Holds the settings of ``cluster``."""

    ray_address: str | None = setting(None, "Join this Ray cluster (host:port or auto) instead of starting one.")
    num_gpus_per_node: int = setting(
        8,
        "GPUs of one node; an engine with more spans several.",
        flags=("--num-gpus-per-node",),
        minimum=1,
        maximum=MACHINES,
    )
    colocate: bool = setting(True, "Trainer and engines share the same cores or GPUs and take turns.")
    offload: bool = setting(
        True, "In colocate mode, free engine memory while training.", flags=("--offload", "--offload-rollout")
    )
    offload_train: bool = setting(
        True, "In colocate mode, keep the trainer's GPU memory (weights, gradients, optimizer) on the host in rollouts."
    )
    gpu_memory_gb: float | None = setting(
        None,
        "Memory of each GPU (GB of 10^9 bytes) for the memory plan, where this machine's driver does not say it.",
        above=0.0,
        maximum=10_000.0,
    )
    actor_start_timeout_s: float = setting(300.0, "Longest wait for an actor to start.", above=0.0, maximum=MAX_WAIT_S)
