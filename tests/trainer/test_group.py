"""The trainer over real Ray actors: steps, pushes, checkpoints."""

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch

from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import expected_shapes, load_tensors
from slime_spec.config.tree import Config, RunConfig
from slime_spec.errors import ConfigError, PushError, TrainingError
from slime_spec.interfaces import RunState
from slime_spec.launch.cluster import Cluster, cluster
from slime_spec.transports.choice import make_transport
from slime_spec.types import TrainSample
from slime_spec.weights.messages import BeginPush, CommitPush, PushBucket, TensorMeta
from slime_spec.weights.receive import PushReceiver
from tests.trainer.trainer_support import make_policy, tiny_config, tiny_samples
from trainer_bridge.megatron.group import MegatronGroup, all_results, joined

LAYOUTS = {
    "1x1": {},
    "TP2": {"world_size": 2, "tensor_model_parallel_size": 2},
    "PP2": {"world_size": 2, "pipeline_model_parallel_size": 2},
}


@pytest.fixture(
    scope="module",
    params=[
        ("1x1", "object_store"),
        pytest.param(("TP2", "ipc"), marks=pytest.mark.long),
        pytest.param(("PP2", "collective"), marks=pytest.mark.long),
    ],
    ids="-".join,
)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = make_policy(tmp_path_factory.mktemp("policy"), "Qwen3ForCausalLM", tied=True)
    layout, transport = request.param
    config = tiny_config(folder, LAYOUTS[layout])
    push = replace(config.push, transport=transport)
    return replace(config, run=RunConfig(mode="train_only"), push=push)


@pytest.fixture(scope="module")
def spec(config: Config) -> ModelSpec:
    return ModelSpec.from_folder(config.model.hf_checkpoint)


@pytest.fixture(scope="module")
def ray_cluster(config: Config, spec: ModelSpec) -> Iterator[Cluster]:
    with cluster(config, spec) as reserved:
        yield reserved


@pytest.fixture(scope="module")
def group(config: Config, ray_cluster: Cluster) -> Iterator[MegatronGroup]:
    group = MegatronGroup(config, ray_cluster.ranks)
    assert group.load() is None
    yield group
    group.stop()


def received(group: MegatronGroup, spec: ModelSpec, version: int) -> dict[str, torch.Tensor]:
    """Take one push as an engine does, every checksum verified."""
    transport = make_transport(group.config)
    weights: dict[str, torch.Tensor] = {}
    indices = []
    for message in group.push(version):
        if isinstance(message, BeginPush):
            receiver = PushReceiver(message.manifest, expected_shapes(spec))
            transport.join(message.routes, 0)
        elif isinstance(message, PushBucket):
            tensors = transport.receive(message)
            receiver.take(message, tensors)
            weights |= {meta.name: tensor.clone() for meta, tensor in zip(message.tensors, tensors, strict=True)}
            indices.append(message.index)
        elif isinstance(message, CommitPush):
            receiver.finish(message.checksum)
            transport.close()
            assert message.version == version
            assert indices == list(range(len(indices)))
            return weights
    raise AssertionError("the push ended without a commit")


def test_a_push_before_any_step_is_the_checkpoint(group: MegatronGroup, config: Config, spec: ModelSpec) -> None:
    pushed = received(group, spec, 1)
    original = load_tensors(config.model.hf_checkpoint, spec)
    assert all(torch.equal(pushed[name], tensor) for name, tensor in original.items())


def test_a_step_changes_what_the_next_push_sends(group: MegatronGroup, spec: ModelSpec) -> None:
    before = received(group, spec, 2)
    report = group.step(tiny_samples())
    assert report.num_optimizer_steps == 1
    assert report.grad_norm > 0
    after = received(group, spec, 3)
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_a_push_that_is_given_up_leaves_the_trainer_able_to_step_and_push(
    group: MegatronGroup, spec: ModelSpec
) -> None:
    messages = group.push(4)
    assert isinstance(next(messages), BeginPush)
    assert isinstance(next(messages), PushBucket)
    assert group.step(tiny_samples(seed=1)).num_tokens > 0
    assert received(group, spec, 5).keys() == expected_shapes(spec).keys()


def test_a_step_with_a_loss_that_is_not_finite_names_the_version_and_changes_nothing(
    group: MegatronGroup, spec: ModelSpec
) -> None:
    before = received(group, spec, 6)
    good = tiny_samples()
    poison = replace(good[0], rollout_logprobs=(math.nan, *good[0].rollout_logprobs[1:]))
    with pytest.raises(TrainingError, match=r"after weight version 6: optimizer step \d+ has loss nan"):
        group.step([poison, *good[1:]])
    after = received(group, spec, 7)
    assert all(torch.equal(before[name], after[name]) for name in before)


@ray.remote(num_cpus=0)
class Rank:
    """A rank of which only the end of a call matters."""

    def hangs(self) -> None:
        time.sleep(600)

    def fails(self) -> None:
        raise ArithmeticError("this rank failed")

    def answers(self, value: int) -> int:
        return value


def test_a_rank_that_fails_is_raised_although_another_hangs(ray_cluster: Cluster) -> None:
    hanging, failing = Rank.remote(), Rank.remote()
    with pytest.raises(ArithmeticError, match="this rank failed"):
        all_results([hanging.hangs.remote(), failing.fails.remote()])
    ray.kill(hanging)


def test_results_are_in_the_order_of_the_ranks(ray_cluster: Cluster) -> None:
    ranks = [Rank.remote() for _ in range(3)]
    assert all_results([rank.answers.remote(value) for value, rank in enumerate(ranks)]) == [0, 1, 2]


def test_a_bucket_that_several_ranks_publish_has_all_their_handles_if_they_agree() -> None:
    bucket = PushBucket(1, 0, (TensorMeta("a", (2,), "float32"),), (5,), ("first",))
    assert joined([bucket, replace(bucket, handle=("second",))]) == replace(bucket, handle=("first", "second"))
    with pytest.raises(PushError, match="ranks hold different weights of a"):
        joined([bucket, replace(bucket, checksums=(6,))])


def test_a_relative_folder_is_the_drivers(
    group: MegatronGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    group.save("checkpoints", RunState(rollout_id=1, next_prompt_id=8, weight_version=1))
    group.export_hf("hf")
    assert (tmp_path / "checkpoints" / "step-000001").is_dir()
    assert (tmp_path / "hf" / "config.json").is_file()


def test_a_checkpoint_saved_by_actors_resumes_in_new_ones(
    group: MegatronGroup, config: Config, spec: ModelSpec, ray_cluster: Cluster, tmp_path: Path
) -> None:
    state = RunState(rollout_id=3, next_prompt_id=24, weight_version=5)
    group.save(str(tmp_path), state)
    resumed_config = replace(config, trainer=replace(config.trainer, load=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"trainer\.load"):
        MegatronGroup(replace(config, trainer=replace(config.trainer, load=str(tmp_path / "no"))), ray_cluster.ranks)
    group.stop()
    resumed = MegatronGroup(resumed_config, ray_cluster.ranks)
    try:
        assert resumed.load() == state
        with pytest.raises(ConfigError, match="context"):
            resumed.step([TrainSample(tuple(range(129)), 120, (-1.0,) * 9, 1.0)])
        resumed.export_hf(str(tmp_path / "export"))
    finally:
        resumed.stop()
    exported = ModelSpec.from_folder(tmp_path / "export")
    assert exported == spec


@pytest.mark.parametrize("config", [pytest.param(("TP2", "ipc"), marks=pytest.mark.long)], indirect=True)
def test_a_push_in_which_one_tensor_rank_fails_raises_its_error_although_the_other_waits_for_it(
    config: Config, ray_cluster: Cluster
) -> None:
    group = MegatronGroup(config, ray_cluster.ranks)
    try:
        group.load()
        ray.get(group.actors[1].__ray_call__.remote(lambda actor: delattr(actor.worker, "model")))
        with pytest.raises(AttributeError, match="model"):
            list(group.push(1))
    finally:
        group.stop()
