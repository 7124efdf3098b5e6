"""A run starts and stops only its own Ray."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import ray

from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.tree import ClusterConfig, Config, RunConfig, SglangServerConfig, TrainerConfig
from slime_spec.errors import ConfigError
from slime_spec.launch.cli import StderrHandler
from slime_spec.launch.cluster import cluster
from slime_spec.placement import plan_bundles
from slime_spec.run_log import RunLog
from slime_spec.stop import StopSignals
from tests.support.fake_config import fake_engine_config
from tests.support.proofs import ROOT


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


def test_the_runs_log_has_what_actors_write_and_the_terminal_has_it_once(config, spec, tmp_path, capfd):
    @ray.remote
    class Talker:
        def talk(self):
            logging.getLogger("talker").warning("an actor's warning")
            sys.stdout.write("an actor's print\n")
            sys.stdout.flush()

    terminal = StderrHandler()
    logging.getLogger().addHandler(terminal)
    before = logging.getLogger().level
    try:
        logging.getLogger().setLevel(logging.INFO)
        with RunLog() as log, cluster(config, spec):
            log.write_to(tmp_path / "run.log")
            ray.get(Talker.remote().talk.remote())
            end = time.monotonic() + 30  # Ray hands lines on as it finds them in its files
            while "actor's print" not in (tmp_path / "run.log").read_text() and time.monotonic() < end:
                time.sleep(0.1)
    finally:
        logging.getLogger().setLevel(before)
        logging.getLogger().removeHandler(terminal)
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert any(line.endswith("an actor's warning") and "Talker pid=" in line for line in lines)
    assert any(line.endswith("an actor's print") for line in lines)
    shown = capfd.readouterr()
    assert (shown.out + shown.err).count("an actor's print") == 1


def is_signalled(folder: Path) -> None:
    """In a process of its own: a signal comes while Ray starts."""
    config = fake_engine_config(folder)
    asking = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    with StopSignals() as stop:
        asking.start()
        with (
            pytest.raises(KeyboardInterrupt),
            stop.interruptible(),
            cluster(config, ModelSpec.from_folder(config.model.hf_checkpoint)),
        ):
            time.sleep(60)
    assert stop.exit_code == 143
    assert not ray.is_initialized()


def is_late(folder: Path) -> None:
    """In a process of its own: Ray has a third of a second to start."""
    config = fake_engine_config(folder)
    with (
        patch("slime_spec.launch.cluster.RAY_START_TIMEOUT_S", 0.3),
        pytest.raises(ConfigError, match=r"Ray must answer within 0\.3 s") as error,
        cluster(config, ModelSpec.from_folder(config.model.hf_checkpoint)),
    ):
        pass
    assert "Ray's logs" in str(error.value)
    assert not ray.is_initialized()


@pytest.mark.parametrize("happens", [is_signalled, is_late], ids=["a signal", "its time is up"])
def test_what_interrupts_rays_start_ends_it(tmp_path: Path, happens: Callable[[Path], None]) -> None:
    """Whenever a signal comes: before Ray has put its own handler in the run's place, meanwhile, and afterwards.

    A Ray that was interrupted aborts the process that starts it again, which a run never does: so not in this process.
    """
    words = (
        "from pathlib import Path; from tests.ray import test_cluster; "
        f"test_cluster.{happens.__name__}(Path({str(tmp_path)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]


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
