"""This module chooses how a run's pushes travel: the setting's transport, or for ``auto`` the nearest that can work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slime_spec.engines import kind_of
from slime_spec.errors import ConfigError
from slime_spec.interfaces import WeightTransport, load

if TYPE_CHECKING:
    from slime_spec.config.tree import Config

AUTO, OBJECT_STORE, IPC = "auto", "object_store", "ipc"
TRANSPORTS = {
    OBJECT_STORE: "slime_spec.transports.ray_object_store:RayObjectStoreTransport",
    IPC: "slime_spec.transports.ipc:IpcTransport",
}


def transport_name(config: Config) -> str:
    """Return the transport of this run's pushes, never ``auto``."""
    if config.push.transport != AUTO:
        return config.push.transport
    return IPC if _shares_gpus(config) and not _why_not_ipc(config) else OBJECT_STORE


def make_transport(config: Config) -> WeightTransport:
    """Make one end of the transport of this run's pushes."""
    transport: WeightTransport = load(TRANSPORTS[transport_name(config)])()
    return transport


def every_rank_publishes(config: Config) -> bool:
    """Return whether each rank publishes all weights: an engine can open those of its own GPU alone."""
    return transport_name(config) == IPC and config.trainer.num_gpus > 0


def check_transport(config: Config) -> None:
    """Raise ConfigError where the transport that is asked for cannot work."""
    reason = _why_not_ipc(config) if config.push.transport == IPC else ""
    if reason:
        raise ConfigError("push.transport", reason, config.push.transport, "Pass --push-transport auto.")


def _shares_gpus(config: Config) -> bool:
    return config.cluster.colocate and config.trainer.num_gpus > 0 and config.rollout.num_gpus_per_engine > 0


def _why_not_ipc(config: Config) -> str:
    """Return why no engine can map a rank's memory, empty where each can."""
    if not kind_of(config).maps_weights:
        return f"ipc ends at the engine, and an {config.rollout.engine} engine computes in a server behind it"
    if not config.trainer.num_gpus and not config.rollout.num_gpus_per_engine:
        return ""  # on a CPU; what machine an engine is on shows when it maps the first bucket
    if not _shares_gpus(config):
        return "ipc needs engines and trainer on the same GPUs (colocated), or both on the CPU of one machine"
    if config.trainer.pipeline_model_parallel_size > 1:
        return "ipc needs all weights on every GPU, and pipeline parallel ranks have only their own layers"
    return ""
