"""A run starts and stops only its own Ray, and joins one that is there."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import ray

from rollout.pool import EnginePool
from slime_spec.config.tree import ClusterConfig, Config, RunConfig, TrainerConfig
from slime_spec.errors import ConfigError
from slime_spec.hf.model_spec import ModelSpec
from slime_spec.launch.cluster import cluster
from slime_spec.placement import plan_bundles
from slime_spec.types import GroupRequest, SamplingParams
from tests.support.fake_config import fake_engine_config

SOMEBODY_ELSES_RAY = """
import ray, sys
context = ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def config(tmp_path) -> Config:
    return fake_engine_config(tmp_path)


@pytest.fixture
def spec(config: Config) -> ModelSpec:
    return ModelSpec.from_folder(config.model.hf_checkpoint)


@pytest.fixture
def running_ray() -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SOMEBODY_ELSES_RAY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    process.stdin.close()
    process.wait(timeout=60)


def with_address(config: Config, address: str) -> Config:
    return replace(config, cluster=ClusterConfig(ray_address=address))


def test_a_run_joins_a_running_cluster_and_leaves_it_running(running_ray, config, spec):
    joined = with_address(config, running_ray)
    with cluster(joined, spec) as reserved, EnginePool(joined, reserved.engines) as pool:
        pool.start()
        samples = list(pool.generate([GroupRequest("g", (1,), (1, 2), SamplingParams(max_new_tokens=3))]))
        assert len(samples) == 2
    assert not ray.is_initialized()
    ray.init(address=running_ray, logging_level="ERROR")
    try:
        # The placement group went back: both cores are free again (Ray reports it within seconds).
        deadline = time.monotonic() + 20
        while ray.available_resources().get("CPU") != 2.0 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert ray.available_resources()["CPU"] == 2.0
    finally:
        ray.shutdown()


def test_a_private_ray_ends_with_its_run(config, spec):
    with cluster(config, spec):
        address = ray.get_runtime_context().gcs_address
        assert ray.is_initialized()
    assert not ray.is_initialized()
    host, _, port = address.rpartition(":")
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((host, int(port)), timeout=2)


@pytest.mark.parametrize(
    ("address", "rule"),
    [("nonsense", "auto or HOST:PORT"), ("127.0.0.1:1", "must be reachable")],
)
def test_an_address_nobody_listens_at_is_refused_at_once(config, spec, address, rule):
    with pytest.raises(ConfigError, match=rule), cluster(with_address(config, address), spec):
        pass


def test_engines_and_ranks_that_take_turns_share_bundles(config):
    colocated = replace(config, run=RunConfig(mode="train"), trainer=TrainerConfig(num_cpus_per_rank=2))
    plan = plan_bundles(colocated)
    assert (plan.engine_bundles, plan.rank_bundles) == ((0, 1), (0,))
    assert (plan.engine_share, plan.rank_share) == (0.5, 0.5)
    assert plan.num_cpus == 4


def test_without_colocation_every_actor_has_a_bundle_of_its_own(config):
    apart = replace(config, run=RunConfig(mode="train"), cluster=ClusterConfig(colocate=False))
    plan = plan_bundles(apart)
    assert (plan.engine_bundles, plan.rank_bundles) == ((0, 1), (2,))
    assert (plan.engine_share, plan.rank_share) == (1.0, 1.0)


def test_a_rollout_only_run_reserves_nothing_for_a_trainer(config):
    assert plan_bundles(config).rank_bundles == ()
