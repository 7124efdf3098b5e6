"""Flags of slime that set something only together with other settings: nodes times GPUs, GPUs over GPUs of an engine.

--actor-num-nodes 4 --actor-num-gpus-per-node 8    trainer.num_gpus=32 trainer.world_size=32
--rollout-num-gpus 32 (an engine has 8)            rollout.num_engines=4
--colocate, and nothing about engines              rollout.num_engines: as many as the trainer's GPUs hold
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from slime_spec.errors import ConfigError

NODES, GPUS_PER_NODE, ROLLOUT_GPUS = "--actor-num-nodes", "--actor-num-gpus-per-node", "--rollout-num-gpus"
CONCURRENCY, ROUTER_IP, ROUTER_PORT = "--sglang-server-concurrency", "--sglang-router-ip", "--sglang-router-port"
NUMBERS = (NODES, GPUS_PER_NODE, ROLLOUT_GPUS, CONCURRENCY, ROUTER_PORT)
TEXTS = (ROUTER_IP,)
# What slime takes where its command line says nothing.
NODES_OF_SLIME, GPUS_PER_NODE_OF_SLIME = 1, 8
# Flag -> what it sets, for a reader.
MEANINGS: Mapping[str, str] = {
    NODES: f"times {GPUS_PER_NODE} (of slime's {GPUS_PER_NODE_OF_SLIME} where absent): --actor-num-gpus and "
    "--actor-world-size; with --colocate and nothing else about engines, also --rollout-num-engines; for engines "
    "that span nodes, also --sglang-weight-transport distributed",
    GPUS_PER_NODE: f"times {NODES} (1 where absent): --actor-num-gpus and --actor-world-size",
    ROLLOUT_GPUS: "over --rollout-num-gpus-per-engine: --rollout-num-engines; without --colocate engines and trainer "
    "have GPUs of their own",
    CONCURRENCY: "--sglang-max-running-requests, where that is not given: the requests that an engine has at once",
    ROUTER_IP: f"with {ROUTER_PORT}: --sglang-router-addr",
    ROUTER_PORT: f"with {ROUTER_IP}: --sglang-router-addr",
}
# What they set besides -> the flags, which somebody who sets that otherwise leaves out.
MADE_BY: Mapping[str, tuple[str, ...]] = {
    "trainer.num_gpus": (NODES, GPUS_PER_NODE),
    "trainer.world_size": (NODES, GPUS_PER_NODE),
    "rollout.num_engines": (ROLLOUT_GPUS,),
}

Lookup = Callable[[str], Any]


def settings_together(given: Mapping[str, Any], lookup: Lookup, named: frozenset[str]) -> dict[str, Any]:
    """Return the settings, by path, that the flags ``given`` make.

    ``lookup`` returns a setting's value as flags and files leave it, ``named`` are the settings that any of them sets.
    Raises ConfigError for numbers that do not divide, and for a setting that is given in both ways.
    """
    made = dict(_settings(given, lookup, named))
    for path, value in made.items():
        if path in named and lookup(path) != value:
            flags = " and ".join(given)
            rule = f"is {lookup(path)} by its own flag or file, and {value} by {flags}"
            raise ConfigError(path, rule, lookup(path), "Give it in one of the two ways.")
    return made


def _settings(given: Mapping[str, Any], lookup: Lookup, named: frozenset[str]) -> Iterator[tuple[str, Any]]:
    num_trained_on, gpus_of_node = None, lookup("cluster.num_gpus_per_node")
    if NODES in given or GPUS_PER_NODE in given:
        num_nodes = given.get(NODES, NODES_OF_SLIME)
        per_node = given.get(GPUS_PER_NODE, GPUS_PER_NODE_OF_SLIME)
        num_trained_on = num_nodes * per_node
        yield "trainer.num_gpus", num_trained_on
        yield "trainer.world_size", num_trained_on or num_nodes  # without GPUs a rank on each node's cores
        if num_nodes > 1:
            gpus_of_node = per_node
            yield "cluster.num_gpus_per_node", per_node
    per_engine = lookup("rollout.num_gpus_per_engine") or 1
    if ROLLOUT_GPUS in given:
        if "cluster.colocate" not in named:
            yield "cluster.colocate", False
        yield from _engines(ROLLOUT_GPUS, given[ROLLOUT_GPUS], per_engine)
    elif num_trained_on and lookup("cluster.colocate") and "rollout.num_engines" not in named:
        yield from _engines(f"{NODES} x {GPUS_PER_NODE}, which --colocate shares", num_trained_on, per_engine)
    spans_nodes = bool({NODES, GPUS_PER_NODE, ROLLOUT_GPUS} & set(given)) and per_engine > gpus_of_node
    if spans_nodes and "sglang_server.transport" not in named:
        yield "sglang_server.transport", "distributed"  # as slime's: an engine over nodes shares no memory
    if CONCURRENCY in given and "engine.max_running_requests" not in named:
        yield "engine.max_running_requests", given[CONCURRENCY]
    if ROUTER_IP in given or ROUTER_PORT in given:
        if not (ROUTER_IP in given and ROUTER_PORT in given):
            rule = "needs its other half: a router has an address and a port"
            raise ConfigError(next(iter({ROUTER_IP, ROUTER_PORT} & set(given))), rule, None, "Pass both.")
        yield "sglang_server.router_addr", f"{given[ROUTER_IP]}:{given[ROUTER_PORT]}"


def _engines(flag: str, num_gpus: int, per_engine: int) -> Iterator[tuple[str, int]]:
    if num_gpus % per_engine or not num_gpus:
        rule = f"must be a multiple of --rollout-num-gpus-per-engine ({per_engine}), and at least that"
        raise ConfigError(flag, rule, num_gpus, "Pass numbers that divide, or --rollout-num-engines N.")
    yield "rollout.num_engines", num_gpus // per_engine
    yield "rollout.num_gpus_per_engine", per_engine
