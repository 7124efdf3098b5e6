"""The pool over real Ray actors, with an engine that needs no model."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from threading import Timer

import pytest
import torch

from rollout.pool import EnginePool
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import expected_shapes
from slime_spec.config.tree import Config, ModelConfig
from slime_spec.errors import ConfigError, PushError
from slime_spec.launch.cluster import Cluster, cluster
from slime_spec.transports.ray_object_store import RayObjectStoreTransport
from slime_spec.types import GroupRequest, SamplingParams
from slime_spec.weights.messages import PreparePush, PushBucket, PushMessage
from slime_spec.weights.run import push_messages, run_push
from tests.support.engine_processes import process_of
from tests.support.fake_config import fake_engine_config


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    return fake_engine_config(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def spec(config: Config) -> ModelSpec:
    return ModelSpec.from_folder(config.model.hf_checkpoint)


@pytest.fixture(scope="module")
def ray_cluster(config: Config, spec: ModelSpec) -> Iterator[Cluster]:
    with cluster(config, spec) as reserved:
        yield reserved


@pytest.fixture(scope="module")
def pool(config: Config, ray_cluster: Cluster) -> Iterator[EnginePool]:
    with EnginePool(config, ray_cluster.engines) as engines:
        engines.start()
        yield engines


def requests(num_groups: int, num_samples: int = 3) -> list[GroupRequest]:
    params = SamplingParams(max_new_tokens=9)
    return [
        GroupRequest(f"g{g}", (1, 2), tuple(100 * g + i for i in range(num_samples)), params) for g in range(num_groups)
    ]


def test_every_sample_of_every_group_comes_back_once_and_both_engines_worked(pool):
    samples = list(pool.generate(requests(10)))
    keys = [(s.group_id, s.sample_index) for s in samples]
    assert sorted(keys) == sorted((f"g{g}", i) for g in range(10) for i in range(3))
    assert {s.engine for s in samples} == {0, 1}


def test_samples_depend_on_their_seed_and_not_on_the_engine_they_ran_on(pool):
    first = {(s.group_id, s.sample_index): s.token_ids for s in pool.generate(requests(6))}
    again = {(s.group_id, s.sample_index): s.token_ids for s in pool.generate(requests(6)[::-1])}
    assert first == again


def messages(spec: ModelSpec, version: int, transport: RayObjectStoreTransport) -> Iterator[PushMessage]:
    generator = torch.Generator().manual_seed(version)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in expected_shapes(spec).items()}
    yield from push_messages(weights, version, "target", 4096, transport)


def test_a_push_through_shared_memory_brings_every_engine_to_the_trainers_checksum(pool, spec):
    report = run_push(messages(spec, 5, RayObjectStoreTransport()), pool.broadcast)
    assert [stats.weight_version for stats in pool.stats()] == [5, 5]
    assert report.num_tensors == len(expected_shapes(spec))
    assert {s.weight_version for s in pool.generate(requests(2))} == {5}


class Flipping(RayObjectStoreTransport):
    """Damages what it carries, after the checksums were taken."""

    def publish(self, named):
        damaged = [(name, tensor.clone()) for name, tensor in named]
        damaged[0][1].view(torch.int32).reshape(-1)[0] ^= 1
        return super().publish(damaged)


def test_a_damaged_push_is_refused_and_every_engine_keeps_its_version(pool, spec):
    before = [stats.weight_version for stats in pool.stats()]
    with pytest.raises(PushError, match="arrived damaged"):
        run_push(messages(spec, 99, Flipping()), pool.broadcast)
    assert [stats.weight_version for stats in pool.stats()] == before


def test_ctrl_c_in_a_push_that_a_hung_engine_holds_up_ends_it_and_the_engines_go_on_from_where_they_were(
    pool, spec, monkeypatch
):
    """Case audit/70, over real processes: the hung engine is told to cancel as well, and does when it comes back."""
    monkeypatch.setattr("rollout.pool.UNDO_TIMEOUT_S", 0.5)
    before = [stats.weight_version for stats in pool.stats()]
    hung = process_of(pool, 1)

    def broadcast(message: PushMessage) -> list:
        if isinstance(message, PushBucket) and message.index == 1:
            os.kill(hung, signal.SIGSTOP)
            Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()  # during the wait, which has no end
        return pool.broadcast(message)

    try:
        with pytest.raises(KeyboardInterrupt):
            run_push(messages(spec, 98, RayObjectStoreTransport()), broadcast, pause_mode="in_place")
    finally:
        os.kill(hung, signal.SIGCONT)
    assert [stats.weight_version for stats in pool.stats()] == before
    with pytest.raises(PushError, match="PreparePush of version 98 outside a push"):
        pool.broadcast(PreparePush(98, ""))
    run_push(messages(spec, 97, RayObjectStoreTransport()), pool.broadcast)
    assert [stats.weight_version for stats in pool.stats()] == [97, 97]


def test_an_engine_that_cannot_start_says_why_in_its_own_words(config, ray_cluster):
    broken = replace(config, model=ModelConfig(hf_checkpoint="/nowhere"))
    only = replace(broken, rollout=replace(config.rollout, num_engines=1))
    with (
        EnginePool(only, replace(ray_cluster.engines, num_cpus=0.0)) as engines,
        pytest.raises(ConfigError, match=r"config\.json"),
    ):
        engines.start()
