"""This module chooses how a run's pushes travel: the setting's transport, or for ``auto`` the nearest that can work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slime_spec.config.sglang_server import size_of
from slime_spec.engines import kind_of
from slime_spec.errors import ConfigError
from slime_spec.interfaces import WeightTransport, load

if TYPE_CHECKING:
    from slime_spec.config.tree import Config

AUTO, OBJECT_STORE, IPC, COLLECTIVE = "auto", "object_store", "ipc", "collective"
TRANSPORTS = {
    OBJECT_STORE: "slime_spec.transports.ray_object_store:RayObjectStoreTransport",
    IPC: "slime_spec.transports.ipc:IpcTransport",
    COLLECTIVE: "slime_spec.transports.collective:CollectiveTransport",
}
# Where the engine computes in a server process: the tensors go there, and not to the engine.
TO_SERVERS = {
    IPC: "slime_spec.transports.server_ipc:ServerIpcTransport",
    COLLECTIVE: "slime_spec.transports.server_group:ServerGroupTransport",
}


def transport_name(config: Config) -> str:
    """Return the transport of this run's pushes, never ``auto``."""
    if config.push.transport != AUTO:
        return config.push.transport
    nearest = (IPC, COLLECTIVE) if config.trainer.num_gpus and config.rollout.num_gpus_per_engine else ()
    return next((name for name in nearest if not _why_not(name, config)), OBJECT_STORE)


def make_transport(config: Config) -> WeightTransport:
    """Make one end of the transport of this run's pushes."""
    name = transport_name(config)
    goes_to_server = name in TO_SERVERS and not kind_of(config).maps_weights
    transport: WeightTransport = (
        load(TO_SERVERS[name])(max(1, config.rollout.num_gpus_per_engine))
        if goes_to_server
        else load(TRANSPORTS[name])()
    )
    return transport


def server_update(config: Config) -> str:
    """Return as which update a push reaches a server: straight from a rank, or as --sglang-weight-transport says."""
    direct = {IPC: "tensor", COLLECTIVE: "distributed"}
    return direct.get(transport_name(config), config.sglang_server.transport)


def every_rank_publishes(config: Config) -> bool:
    """Return whether each rank publishes all weights: an engine can open those of its own GPU alone."""
    return transport_name(config) == IPC and config.trainer.num_gpus > 0


def check_transport(config: Config) -> None:
    """Raise ConfigError where the transport that is asked for cannot work."""
    if reason := _why_not(config.push.transport, config):
        raise ConfigError("push.transport", reason, config.push.transport, "Pass --push-transport auto.")


def _why_not(name: str, config: Config) -> str:
    """Return why a transport cannot bring weights from a rank to every engine; empty where it can."""
    if name not in (IPC, COLLECTIVE):
        return ""
    engine, trainer = config.rollout, config.trainer
    if not kind_of(config).maps_weights and (reason := _why_not_servers(name, config)):
        return reason
    if not trainer.num_gpus and not engine.num_gpus_per_engine:
        return ""  # on a CPU; for ipc, what machine an engine is on shows when it maps the first bucket
    if not trainer.num_gpus or not engine.num_gpus_per_engine:
        return f"{name} needs engines and trainer both on GPUs, or both on CPUs"
    if name == COLLECTIVE:
        return (
            "nccl has one process on each GPU, and colocated engines and ranks are two"
            if config.cluster.colocate
            else ""
        )
    if not config.cluster.colocate:
        return "ipc needs each engine on the GPU of a rank: engines and trainer colocated"
    if trainer.pipeline_model_parallel_size > 1:
        return "ipc needs all weights on every GPU, and pipeline parallel ranks have only their own layers"
    return ""


def _why_not_servers(name: str, config: Config) -> str:
    """Return why a transport cannot bring weights from a rank to every server; empty where servers are no hindrance."""
    if config.sglang_server.transport == "disk":
        return (
            f"{name} leaves a server that is replaced to --sglang-weight-transport, which must be tensor or distributed"
        )
    has_replicas = size_of(config.sglang, "dp_size") > 1 and not config.sglang.get("enable_dp_attention")
    if has_replicas or size_of(config.sglang, "pp_size") > 1:
        return f"{name} knows a server's ranks by their tensor-parallel rank, and several replicas or stages share it"
    if name == IPC and config.rollout.num_gpus_per_engine and kind_of(config).uses_external_servers(config):
        return "ipc needs each server on the GPUs of the ranks, and an external server is on its own"
    return ""
