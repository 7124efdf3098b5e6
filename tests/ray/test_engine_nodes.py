"""An engine that is larger than a node, on a Ray of two nodes: an actor on each, one of them the engine."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster as RayNodes
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rollout.pool import EnginePool
from slime_spec.config.tree import (
    ClusterConfig,
    Config,
    EngineConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    TrainerConfig,
)
from slime_spec.config.tree import SglangServerConfig as ServerConfig
from slime_spec.errors import ConfigError
from slime_spec.launch.cluster import Slot, cluster, in_rows
from slime_spec.types import GroupRequest, SamplingParams
from tests.support.sglang_checkpoints import make_target

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[str]:
    """The address of a Ray of two nodes, with two GPUs each as far as it knows, whose SGLang is the fake."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT / 'tests' / 'support' / 'sglang_fake'}{os.pathsep}{ROOT}")
        nodes = RayNodes()
        for _ in range(2):
            nodes.add_node(num_cpus=2, num_gpus=2, object_store_memory=80 * 2**20, include_dashboard=False)
        yield nodes.address
        nodes.shutdown()


@pytest.fixture
def config(two_nodes: str, tmp_path: Path) -> Config:
    return Config(
        run=RunConfig(mode="rollout_only", output_dir=str(tmp_path / "run")),
        model=ModelConfig(hf_checkpoint=str(make_target(tmp_path / "target"))),
        engine=EngineConfig(max_running_requests=8, max_total_tokens=4096),
        rollout=RolloutConfig(engine="sglang", num_gpus_per_engine=4, num_cpus_per_engine=1),
        # Too short for an actor, were the time for its server not added.
        cluster=ClusterConfig(ray_address=two_nodes, num_gpus_per_node=2, actor_start_timeout_s=0.1),
        sglang_server=ServerConfig(start_timeout_s=60.0, canary_prompts=0),
    )


def servers(config: Config) -> dict[str, psutil.Process]:
    """The fake servers of this configuration, by their --node-rank."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            words = process.cmdline()
            if {"--node-rank", config.model.hf_checkpoint} <= set(words) and "guard.py" not in " ".join(words):
                found[words[words.index("--node-rank") + 1]] = process
    return found


def wait_for_restart(pool: EnginePool, number: int) -> None:
    deadline = time.monotonic() + 60
    while pool.stats()[0].num_restarts < number:
        assert time.monotonic() < deadline, "the server was not replaced"
        time.sleep(0.2)


def test_an_engine_spans_two_nodes_and_outlives_the_death_of_either_server(config: Config) -> None:
    request = GroupRequest("group", (5, 6, 7), (1, 2), SamplingParams(max_new_tokens=40))
    with cluster(config, None) as reserved, EnginePool(config, reserved.engines) as pool:
        pool.start()
        first = servers(config)
        assert first.keys() == {"0", "1"}
        for process in first.values():
            assert process.environ()["CUDA_VISIBLE_DEVICES"] == "0,1"  # all that its node has
            words = process.cmdline()
            assert words[words.index("--host") + 1] == ray.util.get_node_ip_address()
        assert len(list(pool.generate([request]))) == 2
        os.kill(first["1"].pid, signal.SIGKILL)
        wait_for_restart(pool, 1)
        assert [len(sample.token_ids) for sample in pool.generate([request])] == [40, 40]
        assert not {process.pid for process in servers(config).values()} & {process.pid for process in first.values()}
        # Its owner's death is the server's too, though Ray starts another owner.
        ray.kill(pool._members._actors[0].nodes[0], no_restart=False)
        wait_for_restart(pool, 2)
        assert [len(sample.token_ids) for sample in pool.generate([request])] == [40, 40]
    deadline = time.monotonic() + 30
    while servers(config) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert servers(config) == {}


@ray.remote(num_cpus=0, num_gpus=0.5)
def gpu() -> tuple[str, str]:
    return ray.get_runtime_context().get_node_id(), str(ray.get_gpu_ids()[0])


def test_colocated_engines_of_several_gpus_have_theirs_on_one_node_and_share_each_with_a_rank(config: Config) -> None:
    colocated = replace(
        config,
        run=replace(config.run, mode="train"),
        rollout=replace(config.rollout, num_engines=2, num_gpus_per_engine=2),
        trainer=TrainerConfig(world_size=4, num_gpus=4, num_cpus_per_rank=1),
    )
    with cluster(colocated, None) as reserved:
        group, engines, ranks = reserved.engines.placement_group, reserved.engines, reserved.ranks

        def at(bundles: tuple[int, ...]) -> list[tuple[str, str]]:
            places = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=b) for b in bundles]
            return ray.get([gpu.options(scheduling_strategy=place).remote() for place in places])

        assert (engines.num_gpus, ranks.num_gpus) == (0.5, 0.5)
        of_ranks, of_engines = at(ranks.bundles), at(engines.bundles)
        assert len(set(of_ranks)) == 4
        assert len({node for node, _ in of_engines}) == 2
        for engine, bundle in enumerate(engines.bundles):
            devices = engines.devices_of_bundle(bundle)
            assert devices == ("0", "1")
            assert of_ranks[2 * engine : 2 * engine + 2] == [(of_engines[engine][0], device) for device in devices]


def test_gpus_of_an_engine_that_are_not_on_one_node_are_refused() -> None:
    slots = [Slot(0, "b", "1"), Slot(1, "a", "0"), Slot(2, "b", "0"), Slot(3, "a", "10"), Slot(4, "a", "9")]
    assert in_rows(slots[:4], 2) == [2, 0, 1, 3]
    with pytest.raises(ConfigError, match=r"spread as \[2, 3\]"):
        in_rows(slots, 2)
