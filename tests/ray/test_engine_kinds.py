"""What a kind of engine declares of itself, and what the run around it makes of that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rollout.pool import EnginePool
from rollout.shared_part import NothingShared, shared_part
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.tree import Config, SglangServerConfig
from slime_spec.engines import ENGINES, kind_of
from slime_spec.errors import ConfigError
from slime_spec.interfaces import RolloutEngine, SharedPart, load
from slime_spec.launch.cluster import cluster
from slime_spec.placement import num_reserved_gpus
from slime_spec.site import HERE, Site
from tests.support.fake_config import fake_engine_config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return fake_engine_config(tmp_path)


def of_kind(config: Config, engine: str, **settings: object) -> Config:
    return replace(config, rollout=replace(config.rollout, engine=engine, **settings))


class Recorded:
    """A SharedPart that notes what it is asked to do, and whose engines have another capacity."""

    calls: list[str] = []  # noqa: RUF012 - one list, that the test can see it

    def __init__(self, config: Config, site: Site) -> None:
        self.engine_config = replace(config, engine=replace(config.engine, max_total_tokens=77))
        self.site = site

    def start(self) -> None:
        self.calls.append("start")

    def wait_until_ready(self) -> None:
        self.calls.append("wait_until_ready")

    def stop(self) -> None:
        self.calls.append("stop")


class Refused(Recorded):
    """A SharedPart that does not start."""

    def wait_until_ready(self) -> None:
        raise ConfigError("shared", "must start", None, "Start it.")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has the fake engines share a Recorded part; what it was asked."""
    Recorded.calls.clear()
    monkeypatch.setitem(ENGINES, "fake", replace(ENGINES["fake"], shared_part=f"{__name__}:Recorded"))
    return Recorded.calls


def test_the_pool_lets_the_shared_part_outlive_its_engines_and_choose_their_configuration(
    config: Config, calls: list[str]
) -> None:
    with cluster(config, ModelSpec.from_folder(config.model.hf_checkpoint)) as reserved:
        with EnginePool(config, reserved.engines) as pool:
            assert calls == []
            started = pool.start()
            assert calls == ["start", "wait_until_ready"]
        assert calls == ["start", "wait_until_ready", "stop"]
    assert [stats.kv_tokens_capacity for stats in started] == [77, 77]


def test_a_shared_part_that_does_not_start_ends_the_start_in_its_own_words(
    config: Config, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENGINES, "fake", replace(ENGINES["fake"], shared_part=f"{__name__}:Refused"))
    with (
        cluster(config, ModelSpec.from_folder(config.model.hf_checkpoint)) as reserved,
        EnginePool(config, reserved.engines) as pool,
        pytest.raises(ConfigError, match="shared: must start"),
    ):
        pool.start()
    assert calls == ["start", "stop"]


def test_engines_that_share_nothing_get_the_configuration_as_it_is(config: Config) -> None:
    for engine in ENGINES:
        part: SharedPart = shared_part(of_kind(config, engine), HERE)
        assert isinstance(part, NothingShared)
        assert part.engine_config == of_kind(config, engine)


def test_a_kind_names_classes_that_are_there() -> None:
    methods = [name for name in vars(RolloutEngine) if not name.startswith("_")]
    for kind in ENGINES.values():
        assert all(callable(getattr(load(kind.engine), name)) for name in methods)
        assert all(callable(load(path)) for path in (kind.shared_part, kind.node) if path is not None)


def test_only_servers_have_a_start_timeout_of_their_own_and_may_be_somebody_elses(config: Config) -> None:
    served = replace(config, sglang_server=SglangServerConfig(external_addrs=("h:1", "h:2"), start_timeout_s=50.0))
    for engine, timeout_s, num_gpus in (("embedded", 7.0, 1), ("fake", 7.0, 1), ("sglang", 57.0, 0)):
        of_this = of_kind(replace(served, cluster=replace(config.cluster, actor_start_timeout_s=7.0)), engine)
        with_gpu = of_kind(of_this, engine, num_gpus_per_engine=1)
        assert kind_of(of_this).start_timeout_s(of_this) == timeout_s
        assert num_reserved_gpus(with_gpu) == num_gpus


def test_an_unknown_kind_is_refused_with_the_known_ones(config: Config) -> None:
    with pytest.raises(ConfigError, match="must be one of embedded, fake, sglang"):
        kind_of(of_kind(config, "sglan"))
