"""Pushes reach engines in Ray's actors by each transport, whichever of them live."""

import os
import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from rollout.pool import EnginePool
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import expected_shapes
from slime_spec.config.tree import Config
from slime_spec.launch.cluster import cluster
from slime_spec.transports.choice import COLLECTIVE, IPC, OBJECT_STORE, make_transport
from slime_spec.weights.messages import PushBucket, PushMessage, PushReply, VerifyPush
from slime_spec.weights.run import Broadcast, push_messages, push_to_living, run_push
from tests.ray.test_pool import requests
from tests.support.engine_processes import process_of
from tests.support.fake_config import fake_engine_config


@pytest.fixture(scope="module", params=[IPC, COLLECTIVE, OBJECT_STORE])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = fake_engine_config(tmp_path_factory.mktemp("model"))
    return replace(config, push=replace(config.push, transport=request.param))


@pytest.fixture(scope="module")
def pool(config: Config) -> Iterator[EnginePool]:
    spec = ModelSpec.from_folder(config.model.hf_checkpoint)
    with cluster(config, spec) as reserved, EnginePool(config, reserved.engines) as engines:
        engines.start()
        yield engines


def messages(config: Config, version: int, receivers: tuple[int, ...] = ()) -> Generator[PushMessage, None, None]:
    generator = torch.Generator().manual_seed(version)
    shapes = expected_shapes(ModelSpec.from_folder(config.model.hf_checkpoint))
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    num_engines = config.rollout.num_engines
    return push_messages(weights, version, "target", 4096, make_transport(config), num_engines, receivers)


def test_every_engine_computes_with_what_was_sent(pool: EnginePool, config: Config) -> None:
    for version in (1, 2):
        report = run_push(messages(config, version), pool.broadcast, verify=True)
        assert report.verified
        assert [stats.weight_version for stats in pool.stats()] == [version, version]


class Killing:
    """Engines of which one is killed before a message of a push."""

    def __init__(self, pool: EnginePool, engine: int, before: type[PushMessage]) -> None:
        self.receivers, self.leave_out_failed, self.pool = pool.receivers, pool.leave_out_failed, pool
        self.process, self.before = process_of(pool, engine), before

    def broadcast(self, message: PushMessage) -> Sequence[PushReply]:
        if isinstance(message, self.before) and getattr(message, "index", 1) == 1 and self.process:
            os.kill(self.process, signal.SIGKILL)
            self.process = 0
        return self.pool.broadcast(message)


@pytest.mark.parametrize(("killed", "before"), [(1, PushBucket), (0, VerifyPush)])
def test_where_an_engine_dies_in_a_push_the_other_has_it_and_the_one_in_its_place_is_brought_to_it(
    killed: int, before: type[PushMessage], pool: EnginePool, config: Config
) -> None:
    version, asked = 9 + 2 * killed, requests(12)
    pushed: list[tuple[int, ...]] = []

    def make(receivers: tuple[int, ...]) -> Generator[PushMessage, None, None]:
        pushed.append(receivers)
        return messages(config, version, receivers)

    def bring_up(engine: int, broadcast: Broadcast) -> bool:
        report = run_push(make((engine,)), broadcast, verify=True)
        assert report.verified
        return True

    pool.bring_up_with(bring_up)
    report = push_to_living(make, Killing(pool, killed, before), "target", verify=True)
    assert report is not None
    assert report.verified
    assert pool.receivers() == (1 - killed,)
    while len(pool.receivers()) == 1:
        assert {sample.weight_version for sample in pool.generate(asked)} == {version}
    assert pushed == [(0, 1), (1 - killed,), (killed,)]
    samples = list(pool.generate(asked))
    assert {(sample.engine, sample.weight_version) for sample in samples} == {(0, version), (1, version)}
    assert [stats.weight_version for stats in pool.stats()] == [version, version]
    assert pool.stats()[killed].num_restarts == 1
    run_push(messages(config, version + 10), pool.broadcast, verify=True)
