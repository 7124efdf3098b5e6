"""A run starts and stops only its own Ray."""

import os
import signal
import socket
import threading
import time
from dataclasses import replace

import pytest
import ray

from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.tree import ClusterConfig, Config, RunConfig, SglangServerConfig, TrainerConfig
from slime_spec.errors import ConfigError
from slime_spec.launch.cluster import cluster
from slime_spec.placement import plan_bundles
from slime_spec.stop import StopSignals
from tests.support.fake_config import fake_engine_config


@pytest.fixture
def config(tmp_path) -> Config:
    return fake_engine_config(tmp_path)


@pytest.fixture
def spec(config: Config) -> ModelSpec:
    return ModelSpec.from_folder(config.model.hf_checkpoint)


def with_address(config: Config, address: str) -> Config:
    return replace(config, cluster=ClusterConfig(ray_address=address))


def test_a_private_ray_ends_with_its_run(config, spec):
    handler = signal.getsignal(signal.SIGTERM)
    with cluster(config, spec):
        assert signal.getsignal(signal.SIGTERM) == handler, "Ray's own would end the run in the middle of its work"
        address = ray.get_runtime_context().gcs_address
        assert ray.is_initialized()
    assert not ray.is_initialized()
    host, _, port = address.rpartition(":")
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((host, int(port)), timeout=2)


def test_a_signal_while_ray_starts_ends_the_start(config, spec):
    """Whenever it comes: before Ray has put its own handler in the run's place, meanwhile, and afterwards."""
    asking = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    with StopSignals() as stop:
        asking.start()
        with pytest.raises(KeyboardInterrupt), stop.interruptible(), cluster(config, spec):
            time.sleep(60)
    assert stop.exit_code == 143
    assert not ray.is_initialized()


def test_a_ray_that_does_not_start_in_time_is_an_error_that_says_where_to_look(config, spec):
    short = replace(config, cluster=ClusterConfig(actor_start_timeout_s=0.3))
    with pytest.raises(ConfigError, match="Ray must start within it") as error, cluster(short, spec):
        pass
    assert "Ray's logs" in str(error.value)
    assert not ray.is_initialized()


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


def on_gpus(config: Config, num_gpus_per_engine: int, colocate: bool) -> Config:
    """Two SGLang engines and a trainer of four GPUs, on nodes of two."""
    return replace(
        config,
        run=RunConfig(mode="train"),
        rollout=replace(config.rollout, engine="sglang", num_gpus_per_engine=num_gpus_per_engine),
        trainer=TrainerConfig(world_size=4, num_gpus=4),
        cluster=ClusterConfig(colocate=colocate, num_gpus_per_node=2),
    )


def test_an_engine_has_a_bundle_on_each_of_its_nodes(config):
    plan = plan_bundles(on_gpus(config, 4, colocate=False))
    assert plan.engine_nodes == ((0, 1), (2, 3))
    assert plan.engine_bundles == (0, 2)
    assert plan.rank_bundles == (4, 5, 6, 7)
    assert [bundle.num_gpus for bundle in plan.bundles] == [2.0] * 4 + [1.0] * 4


def test_a_colocated_engine_shares_each_of_its_gpus_with_a_rank_and_no_more_are_reserved(config):
    plan = plan_bundles(on_gpus(config, 2, colocate=True))
    assert [bundle.num_gpus for bundle in plan.bundles] == [1.0] * 4
    assert (plan.engine_nodes, plan.rank_bundles) == (((0,), (2,)), (0, 1, 2, 3))
    assert (plan.engine_share, plan.rank_share, plan.together) == (0.5, 0.5, 2)


def test_a_server_that_somebody_else_started_takes_no_gpu_of_ours(config):
    apart = on_gpus(config, 4, colocate=False)
    plan = plan_bundles(replace(apart, sglang_server=SglangServerConfig(external_addrs=("a:1", "b:1"))))
    assert plan.engine_nodes == ((0,), (1,))
    assert [bundle.num_gpus for bundle in plan.bundles[:2]] == [0.0, 0.0]
