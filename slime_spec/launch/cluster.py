"""Start Ray for a run or join the user's, reserve one placement group, and release only the run's resources."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import expected_shapes
from slime_spec.config.addresses import parse_address
from slime_spec.config.tree import Config
from slime_spec.engines import kind_of
from slime_spec.errors import ConfigError
from slime_spec.launch.ray_environment import LOGS
from slime_spec.launch.waiting import limited, told
from slime_spec.launch.worker_lines import worker_lines_logged
from slime_spec.placement import Bundle, BundlePlan, Placement, plan_bundles
from slime_spec.weights.served import ServedForm

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
RAY_START_TIMEOUT_S = 300.0
RESERVE_TIMEOUT_S = 60.0
# Room for samples and bookkeeping, besides the weights that a push holds in shared memory.
OBJECT_STORE_SLACK_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Cluster:
    """Holds the reserved places of a run's actors."""

    engines: Placement
    ranks: Placement


@dataclass(frozen=True)
class Slot:
    """Says where a bundle of one GPU is: ``Slot(bundle=3, node="f00d...", gpu="1")``."""

    bundle: int
    node: str
    gpu: str


@contextmanager
def cluster(config: Config, spec: ModelSpec | None) -> Iterator[Cluster]:
    """Provide Ray and the placement group for this run.

    A Ray that this run started ends with the run; a joined Ray keeps running, and only the placement group is removed.
    """
    plan = plan_bundles(config)
    try:
        if config.cluster.ray_address is None:
            _start_ray(plan, spec, config)
        else:
            _join_ray(str(config.cluster.ray_address))
        with worker_lines_logged(), _reserved(plan) as reserved:
            yield reserved
    finally:
        ray.shutdown()  # this only disconnects from a joined cluster


def _start_ray(plan: BundlePlan, spec: ModelSpec | None, config: Config) -> None:
    cores = os.cpu_count() or 1
    if plan.num_cpus > cores:
        logger.warning("more cores reserved than this machine has reserved=%g cores=%d", plan.num_cpus, cores)
    _init_ray(
        address="local",
        num_cpus=max(cores, int(plan.num_cpus)),
        num_gpus=ceil(plan.num_gpus),  # preflight has counted them; Ray's own count needs NVIDIA's management library
        include_dashboard=False,
        object_store_memory=_object_store_bytes(spec, config),
        logging_level=logging.WARNING,
        log_to_driver=True,
    )


def _init_ray(address: str, **settings: Any) -> None:
    """Call ray.init, and end it after RAY_START_TIMEOUT_S: it waits for ever for a head that it cannot reach.

    It replaces SIGTERM's handler by its own, which ends the process in the middle of its work.
    """
    before = signal.getsignal(signal.SIGTERM)
    is_asked = False
    try:
        with limited(RAY_START_TIMEOUT_S), told("Ray", "Ray started", LOGS):
            ray.init(address, **settings)
    except SystemExit:  # Ray's handler has run
        is_asked = True
    except TimeoutError:
        rule = f"its Ray must answer within {RAY_START_TIMEOUT_S:g} s"
        raise ConfigError(
            "cluster.ray_address", rule, address, f"Look in {LOGS}, or free the machine's cores."
        ) from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    if is_asked:
        signal.raise_signal(signal.SIGTERM)


def _object_store_bytes(spec: ModelSpec | None, config: Config) -> int:
    if spec is None:  # without a trainer nothing is pushed
        return OBJECT_STORE_SLACK_BYTES
    total = sum(meta.nbytes for meta in ServedForm.of(config).metas(expected_shapes(spec)))
    return kind_of(config).num_weight_copies * (total + total // 8) + OBJECT_STORE_SLACK_BYTES


def _join_ray(address: str) -> None:
    """Join a running cluster; raise within seconds if nothing listens at the address."""
    remedy = (
        "Start Ray there (ray start --head; with tokens, share its token), or drop --ray-address for a private Ray."
    )
    if address != "auto":
        try:
            host_and_port = parse_address("cluster.ray_address", address.removeprefix("ray://"))
        except ConfigError as error:
            rule = f"must be auto or HOST:PORT, which {error.rule}"
            raise ConfigError("cluster.ray_address", rule, address, remedy) from None
        try:
            socket.create_connection(host_and_port, timeout=CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise ConfigError("cluster.ray_address", f"must be reachable: {error}", address, remedy) from None
    try:
        _init_ray(address, logging_level=logging.WARNING)
    except ConfigError:  # it says itself what is wrong
        raise
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
        where = _where_bundles_are(group, len(bundles)) if plan.together > 1 else None
        yield _placed(group, plan, where)
    finally:
        remove_placement_group(group)


def _where_bundles_are(group: PlacementGroup, num_bundles: int) -> list[Slot]:
    """Return each bundle's node and GPU: Ray places bundles of one GPU in no fixed order."""

    def slot() -> tuple[str, str]:
        return ray.get_runtime_context().get_node_id(), str(ray.get_gpu_ids()[0])

    asked = ray.remote(num_cpus=0, num_gpus=1)(slot)
    at = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i) for i in range(num_bundles)]
    found = ray.get([asked.options(scheduling_strategy=strategy).remote() for strategy in at])
    return [Slot(bundle, node, gpu) for bundle, (node, gpu) in enumerate(found)]


def _placed(group: object, plan: BundlePlan, where: list[Slot] | None) -> Cluster:
    """Return the plan's bundles as Ray placed them; ``where`` is given if some bundles must share a node."""
    row = list(range(len(plan.bundles))) if where is None else in_rows(where, plan.together)
    gpu_of = {} if where is None else {slot.bundle: slot.gpu for slot in where}
    nodes = tuple(tuple(row[bundle] for bundle in engine) for engine in plan.engine_nodes)
    devices = {
        row[first]: tuple(gpu_of[bundle] for bundle in row[first : first + plan.together])
        for engine in plan.engine_nodes
        for first in engine
        if gpu_of
    }

    def share(bundles: tuple[int, ...], part: float) -> tuple[float, float]:
        first = plan.bundles[bundles[0]] if bundles else Bundle(0.0, 0.0)
        return first.num_cpus * part, first.num_gpus * part

    engines = tuple(engine[0] for engine in nodes)
    ranks = tuple(row[bundle] for bundle in plan.rank_bundles)
    return Cluster(
        engines=Placement(group, engines, *share(plan.engine_bundles, plan.engine_share), nodes, devices),
        ranks=Placement(group, ranks, *share(plan.rank_bundles, plan.rank_share)),
    )


def in_rows(slots: Sequence[Slot], length: int) -> list[int]:
    """Order bundles so that each ``length`` in a row are on one node, their GPUs ascending.

    Raises ConfigError where the number of bundles on a node is no multiple of ``length``.
    """
    nodes: dict[str, list[Slot]] = {}
    for slot in slots:
        nodes.setdefault(slot.node, []).append(slot)
    counts = [len(of_node) for of_node in nodes.values()]
    if any(count % length for count in counts):
        raise ConfigError(
            "rollout.num_gpus_per_engine",
            f"an engine's {length} GPUs of one node must be on one node, and the job's are spread as {counts}",
            length,
            "Set --num-gpus-per-node to what the nodes have free, or use whole nodes.",
        )
    in_order = [sorted(of_node, key=lambda slot: (len(slot.gpu), slot.gpu)) for of_node in nodes.values()]
    return [slot.bundle for of_node in in_order for slot in of_node]
