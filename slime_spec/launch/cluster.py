"""Ray for one run: start our own or join the user's, reserve one placement group, give back only what is ours."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.hf.checkpoint import expected_shapes
from slime_spec.hf.model_spec import ModelSpec
from slime_spec.placement import BundlePlan, Placement, plan_bundles

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
RESERVE_TIMEOUT_S = 60.0
# Samples and bookkeeping besides the one copy of the weights that a push holds in shared memory.
OBJECT_STORE_SLACK_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Cluster:
    """The reserved places of a run's actors."""

    engines: Placement
    ranks: Placement


@contextmanager
def cluster(config: Config, spec: ModelSpec | None) -> Iterator[Cluster]:
    """Ray and the placement group for this run.

    A Ray that this run started ends with it; a joined one keeps running, only the placement group goes back.
    """
    plan = plan_bundles(config)
    owns_ray = config.cluster.ray_address is None
    if owns_ray:
        _start_ray(plan, spec, config)
    else:
        _join_ray(str(config.cluster.ray_address))
    try:
        with _reserved(plan) as reserved:
            yield reserved
    finally:
        ray.shutdown()  # for a joined cluster this only disconnects


def _start_ray(plan: BundlePlan, spec: ModelSpec | None, config: Config) -> None:
    cores = os.cpu_count() or 1
    if plan.num_cpus > cores:
        logger.warning("more cores reserved than this machine has reserved=%g cores=%d", plan.num_cpus, cores)
    ray.init(
        address="local",
        num_cpus=max(cores, int(plan.num_cpus)),
        include_dashboard=False,
        object_store_memory=_object_store_bytes(spec, config),
        logging_level=logging.WARNING,
        log_to_driver=True,
    )


def _object_store_bytes(spec: ModelSpec | None, config: Config) -> int:
    if spec is None:  # rollouts alone: nothing is pushed
        return OBJECT_STORE_SLACK_BYTES
    itemsize = 4 if config.engine.dtype == "float32" else 2
    total = 0
    for shape in expected_shapes(spec).values():
        size = itemsize
        for dim in shape:
            size *= dim
        total += size
    # An SGLang engine keeps what it was last pushed, for a server that must be restarted, while the next push arrives.
    num_copies = 2 if config.rollout.engine == "sglang" else 1
    return num_copies * (total + total // 8) + OBJECT_STORE_SLACK_BYTES


def _join_ray(address: str) -> None:
    """Join a running cluster; an address nobody listens at is refused within seconds."""
    remedy = (
        "Start Ray there (ray start --head; with tokens, share its token), or drop --ray-address for a private Ray."
    )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address != "auto":
        if not host or not port.isdigit():
            raise ConfigError("cluster.ray_address", "must be auto or HOST:PORT", address, remedy)
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise ConfigError("cluster.ray_address", f"must be reachable: {error}", address, remedy) from None
    try:
        ray.init(address=address, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError("cluster.ray_address", f"must be a running Ray: {error}", address, remedy) from None


@contextmanager
def _reserved(plan: BundlePlan) -> Iterator[Cluster]:
    bundles = [{"CPU": b.num_cpus, **({"GPU": b.num_gpus} if b.num_gpus else {})} for b in plan.bundles]
    group = placement_group(bundles, strategy="PACK")
    try:
        if not group.wait(RESERVE_TIMEOUT_S):
            raise ConfigError(
                "cluster",
                "must have room for the engines and the trainer",
                f"wanted {bundles}, there is {ray.cluster_resources()}",
                "Ask for fewer engines or cores, set cluster.colocate=true, or join a larger Ray.",
            )
        yield Cluster(
            engines=_placement(group, plan, plan.engine_bundles, plan.engine_share),
            ranks=_placement(group, plan, plan.rank_bundles, plan.rank_share),
        )
    finally:
        remove_placement_group(group)


def _placement(group: object, plan: BundlePlan, indices: tuple[int, ...], share: float) -> Placement:
    if not indices:
        return Placement(group, (), 0.0, 0.0)
    bundle = plan.bundles[indices[0]]
    return Placement(group, indices, bundle.num_cpus * share, bundle.num_gpus * share)
