"""A run's transport is chosen by where its engines and its trainer are; one that cannot work is refused at once."""

from dataclasses import replace

import pytest

from slime_spec.config.checks import check
from slime_spec.config.tree import (
    ClusterConfig,
    Config,
    ModelConfig,
    PushConfig,
    RolloutConfig,
    SglangServerConfig,
    TrainerConfig,
)
from slime_spec.errors import ConfigError
from slime_spec.interfaces import load
from slime_spec.transports.choice import TRANSPORTS, every_rank_publishes, transport_name


def placed(transport: str, gpus: int, *, colocate: bool = True, engine: str = "embedded", pipeline: int = 1) -> Config:
    """A run with as many engines as ranks, each on a GPU or none."""
    ranks = max(gpus, pipeline)
    return Config(
        model=ModelConfig(hf_checkpoint="folder"),
        rollout=RolloutConfig(engine=engine, num_engines=ranks, num_gpus_per_engine=min(gpus, 1)),
        trainer=TrainerConfig(world_size=ranks, num_gpus=gpus, pipeline_model_parallel_size=pipeline),
        cluster=ClusterConfig(colocate=colocate),
        push=PushConfig(transport=transport),
    )


def replicated(config: Config) -> Config:
    return replace(config, rollout=replace(config.rollout, num_gpus_per_engine=2), sglang={"dp_size": 2})


def by_disk(config: Config) -> Config:
    return replace(config, sglang_server=SglangServerConfig(transport="disk"))


def external(config: Config) -> Config:
    return replace(config, sglang_server=SglangServerConfig(external_addrs=("10.0.0.1:30000",)))


def on_cpu_engines(config: Config) -> Config:
    return replace(config, rollout=replace(config.rollout, num_gpus_per_engine=0))


@pytest.mark.parametrize(
    ("config", "name", "by_every_rank"),
    [
        (placed("auto", 0), "object_store", False),
        (placed("auto", 1), "ipc", True),
        (placed("auto", 8), "ipc", True),
        (placed("auto", 8, colocate=False), "collective", False),
        (placed("auto", 2, colocate=False, pipeline=2), "collective", False),
        (placed("auto", 2, pipeline=2), "object_store", False),
        (placed("auto", 0, engine="sglang"), "object_store", False),
        (placed("auto", 1, engine="sglang"), "ipc", True),
        (placed("auto", 8, engine="sglang"), "ipc", True),
        (placed("auto", 8, colocate=False, engine="sglang"), "collective", False),
        (replicated(placed("auto", 8, colocate=False, engine="sglang")), "object_store", False),
        (by_disk(placed("auto", 8, engine="sglang")), "object_store", False),
        (external(placed("auto", 1, engine="sglang")), "object_store", False),
        (placed("ipc", 0, engine="sglang"), "ipc", False),
        (placed("collective", 0, engine="sglang"), "collective", False),
        (placed("ipc", 0), "ipc", False),
        (placed("ipc", 0, pipeline=2), "ipc", False),
        (placed("collective", 0, pipeline=2), "collective", False),
        (placed("object_store", 1), "object_store", False),
    ],
)
def test_auto_takes_the_nearest_way_that_there_is(config: Config, name: str, by_every_rank: bool) -> None:
    check(config)
    assert transport_name(config) == name
    assert every_rank_publishes(config) is by_every_rank


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (placed("ipc", 2, colocate=False), "on the GPU of a rank"),
        (on_cpu_engines(placed("ipc", 2, colocate=False)), "both on GPUs, or both on CPUs"),
        (placed("collective", 2), "one process on each GPU"),
        (placed("collective", 2, engine="sglang"), "one process on each GPU"),
        (replicated(placed("collective", 2, colocate=False, engine="sglang")), "several replicas or stages share it"),
        (by_disk(placed("collective", 0, engine="sglang")), "must be tensor or distributed"),
        (external(placed("ipc", 1, engine="sglang")), "an external server is on its own"),
        (placed("ipc", 2, pipeline=2), "only their own layers"),
        (placed("ipc", 2, colocate=False, engine="sglang"), "on the GPU of a rank"),
        (placed("ipc", 2, pipeline=2, engine="sglang"), "only their own layers"),
    ],
)
def test_a_transport_that_cannot_reach_the_engines_is_refused(config: Config, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check(config)
    assert (refused.value.setting, refused.value.value) == ("push.transport", config.push.transport)
    assert says in refused.value.rule


@pytest.mark.parametrize("name", TRANSPORTS)
def test_every_transport_has_both_ends(name: str) -> None:
    transport = load(TRANSPORTS[name])()
    assert isinstance(transport.lends, bool)
    transport.close()  # at either end, before anything was published or received
