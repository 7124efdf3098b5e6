"""Pushes beside Ray's object store reach engines in Ray's actors, and an engine's death ends them as any push."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest
import ray
import torch

from rollout.pool import EnginePool
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import expected_shapes
from slime_spec.config.tree import Config
from slime_spec.errors import PushError
from slime_spec.launch.cluster import cluster
from slime_spec.transports.choice import COLLECTIVE, IPC, make_transport
from slime_spec.weights.messages import PushBucket, PushMessage
from slime_spec.weights.run import push_messages, run_push
from tests.support.fake_config import fake_engine_config


@pytest.fixture(scope="module", params=[IPC, COLLECTIVE])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = fake_engine_config(tmp_path_factory.mktemp("model"))
    return replace(config, push=replace(config.push, transport=request.param))


@pytest.fixture(scope="module")
def pool(config: Config) -> Iterator[EnginePool]:
    spec = ModelSpec.from_folder(config.model.hf_checkpoint)
    with cluster(config, spec) as reserved, EnginePool(config, reserved.engines) as engines:
        engines.start()
        yield engines


def messages(config: Config, version: int) -> Iterator[PushMessage]:
    generator = torch.Generator().manual_seed(version)
    shapes = expected_shapes(ModelSpec.from_folder(config.model.hf_checkpoint))
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return push_messages(weights, version, "target", 4096, make_transport(config), config.rollout.num_engines)


def test_every_engine_computes_with_what_was_sent(pool: EnginePool, config: Config) -> None:
    for version in (1, 2):
        report = run_push(messages(config, version), pool.broadcast, verify=True)
        assert report.verified
        assert [stats.weight_version for stats in pool.stats()] == [version, version]


def test_an_engine_whose_process_dies_ends_the_push_and_the_other_keeps_its_version(
    pool: EnginePool, config: Config
) -> None:
    """Killed once the buckets travel: the last test of its pool."""
    sound, dying = pool._actors
    process = ray.get(dying.__ray_call__.remote(lambda worker: os.getpid()))

    def broadcast(message: PushMessage) -> list:
        if isinstance(message, PushBucket) and message.index == 1:
            os.kill(process, signal.SIGKILL)
        return pool.broadcast(message)

    with pytest.raises(PushError, match="an engine's process died"):
        run_push(messages(config, 9), broadcast)
    assert ray.get(sound.stats.remote()).weight_version == 2
