"""These checks refuse settings of the SGLang engine's servers that cannot work together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields

from slime_spec.config.addresses import ANY_HOST, is_loopback, parse_address
from slime_spec.config.sglang_server import SglangServerConfig, size_of
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError

ADDRESSES, HOST, ROUTER = "sglang_server.external_addrs", "sglang_server.host", "sglang_server.router_addr"
# Settings that are read only to start a server.
OF_STARTING = ("port", "extra_args", "max_restarts")


def check_servers(config: Config) -> None:
    """Raise ConfigError for the first contradiction."""
    _check_external(config)
    _check_router(config)
    if not config.sglang_server.external_addrs:
        _check_data_parallel(config)
        _check_ranks(config)
        _check_nodes(config)


def server_notes(config: Config) -> Iterator[str]:
    """Yield notes on server settings that a user should know, one sentence each."""
    host = config.sglang_server.host
    if host is not None and not is_loopback(host) and config.sglang_server.api_key_file is None:
        yield (
            f"The servers listen on {host} without --sglang-api-key-file: whoever reaches it can use them and "
            "replace their weights."
        )
    if config.sglang_server.external_addrs:
        flags = [f"--sglang-{dest.replace('_', '-')}" for dest in config.sglang]
        if without := [*flags, *_set_here(config, OF_STARTING)]:
            yield f"Servers that run already have their own flags: {', '.join(without)} change nothing there."


def unused_server_settings(config: Config) -> Iterator[str]:
    """Yield a note on settings of servers in a run that has none."""
    if names := _set_here(config, tuple(each.name for each in fields(SglangServerConfig))):
        yield f"The {config.rollout.engine} engine starts no servers and has no use for {', '.join(names)}."


def _set_here(config: Config, names: Sequence[str]) -> list[str]:
    """Return the servers' settings among ``names`` that are not at their defaults, as the tree names them."""
    default = SglangServerConfig()
    return [f"sglang_server.{name}" for name in names if getattr(config.sglang_server, name) != getattr(default, name)]


def _check_external(config: Config) -> None:
    addresses, num_engines = config.sglang_server.external_addrs, config.rollout.num_engines
    for address in addresses:
        parse_address(ADDRESSES, address)
    if len(set(addresses)) < len(addresses):
        raise ConfigError(ADDRESSES, "must name each server once", addresses, "Name another server for each engine.")
    if addresses and len(addresses) != num_engines:
        raise ConfigError(
            ADDRESSES,
            f"must have one server for each of the {num_engines} engines",
            addresses,
            f"Pass --rollout-num-engines {len(addresses)}, or name {num_engines} servers.",
        )


def _check_router(config: Config) -> None:
    server = config.sglang_server
    if server.router_addr is not None:
        parse_address(ROUTER, server.router_addr)
        if server.router:
            raise ConfigError(
                ROUTER, "is a router that runs already", server.router_addr, "Drop --sglang-router, or the address."
            )
    if server.router_args and not server.router:
        raise ConfigError(
            "sglang_server.router_args", "is for a router of our own", server.router_args, "Pass --sglang-router."
        )


def _check_data_parallel(config: Config) -> None:
    num_gpus, replicas = config.rollout.num_gpus_per_engine, size_of(config.sglang, "dp_size")
    if replicas < 1 or max(1, num_gpus) % replicas:  # the CPU is one device
        raise ConfigError(
            "sglang.dp_size",
            f"must divide the {num_gpus} GPUs of an engine: each replica has as many",
            replicas,
            "Pass another --sglang-dp-size, or --rollout-num-gpus-per-engine.",
        )


def _check_ranks(config: Config) -> None:
    """Check that the user's sizes use the GPUs that the engine reserves, all of them and no others."""
    num_gpus, sizes = config.rollout.num_gpus_per_engine, config.sglang
    if not num_gpus or not sizes.keys() & {"tp_size", "pp_size"}:
        return
    stages = size_of(sizes, "pp_size")
    replicas = 1 if sizes.get("enable_dp_attention") else size_of(sizes, "dp_size")
    ranks = size_of(sizes, "tp_size") if "tp_size" in sizes else num_gpus // replicas
    if ranks * stages * replicas != num_gpus:
        raise ConfigError(
            "sglang.tp_size",
            f"times pp_size ({stages}) and the replicas ({replicas}) must be the {num_gpus} GPUs of an engine",
            ranks,
            "Leave it out, or pass another --rollout-num-gpus-per-engine.",
        )


def _check_nodes(config: Config) -> None:
    """Check that several nodes hold an engine's GPUs evenly, reach each other, and take weights over the network."""
    num_gpus, per_node = config.rollout.num_gpus_per_engine, config.cluster.num_gpus_per_node
    server = config.sglang_server
    if num_gpus <= per_node:
        return
    if num_gpus % per_node:
        raise ConfigError(
            "rollout.num_gpus_per_engine",
            f"beyond one node's GPUs must be a multiple of cluster.num_gpus_per_node = {per_node}",
            num_gpus,
            f"Pass --rollout-num-gpus-per-engine {per_node * (num_gpus // per_node)}, or --num-gpus-per-node.",
        )
    if server.host not in (None, *ANY_HOST):
        raise ConfigError(
            HOST,
            f"is at most one node's address, and an engine of {num_gpus} GPUs spans {num_gpus // per_node} nodes",
            server.host,
            "Leave out --sglang-host: each node then listens on its own address.",
        )
    if config.run.mode == "train" and server.transport == "tensor":
        raise ConfigError(
            "sglang_server.transport",
            "tensor shares the memory of one node, and an engine spans several",
            server.transport,
            "Pass --sglang-weight-transport distributed.",
        )
