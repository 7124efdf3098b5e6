"""Servers that cannot be: refused with the way out, before anything starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from slime_spec.config.addresses import address_of, is_loopback, parse_address
from slime_spec.config.checks import check, notes
from slime_spec.config.tree import ClusterConfig, Config, RolloutConfig, RunConfig, SglangServerConfig, TrainerConfig
from slime_spec.errors import ConfigError
from slime_spec.placement import num_reserved_gpus

SETTING = "sglang_server.external_addrs"


def serving(num_gpus: int = 0, num_engines: int = 1, sglang: dict[str, object] | None = None, **server: Any) -> Config:
    return Config(
        run=RunConfig(mode="rollout_only"),
        rollout=RolloutConfig(engine="sglang", num_gpus_per_engine=num_gpus, num_engines=num_engines),
        cluster=ClusterConfig(num_gpus_per_node=8),
        sglang_server=SglangServerConfig(**server),
        sglang=sglang or {},
    )


@pytest.mark.parametrize("address", ["127.0.0.1:30000", "node-3.cluster:1", "[::1]:30000", "[fe80::1]:65535"])
def test_an_address_is_a_host_and_a_port(address: str) -> None:
    assert address_of(*parse_address(SETTING, address)) == address


@pytest.mark.parametrize(
    ("address", "rule"),
    [
        ("127.0.0.1", "must end in a port"),
        ("127.0.0.1:", "must end in a port"),
        (":30000", "must end in a port"),
        ("node:65536", "must end in a port"),
        ("node:0", "must end in a port"),
        ("node:http", "must end in a port"),
        ("::1:30000", "brackets"),
        ("[node]:30000", "brackets"),
        ("http://node:30000", "without a scheme"),
        ("node:30000/v1", "without a scheme"),
    ],
)
def test_what_is_no_address_is_refused(address: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        check(serving(external_addrs=(address,)))
    with pytest.raises(ConfigError, match=rule):
        check(serving(router_addr=address))


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (serving(num_engines=2, external_addrs=("a:1",)), "one server for each of the 2 engines"),
        (serving(external_addrs=("a:1", "a:2")), "--rollout-num-engines 2"),
        (serving(num_engines=2, external_addrs=("a:1", "a:1")), "each server once"),
        (serving(router=True, router_addr="a:1"), "runs already"),
        (serving(router_args=("--policy", "random")), "--sglang-router"),
        (serving(num_gpus=4, sglang={"dp_size": 3}), "must divide the 4 GPUs"),
        (serving(num_gpus=1, sglang={"tp_size": 2}), "must be the 1 GPUs"),
        (serving(num_gpus=4, sglang={"pp_size": 2}), r"pp_size \(2\)"),
        (serving(num_gpus=4, sglang={"tp_size": 4, "dp_size": 2}), r"replicas \(2\)"),
        (serving(num_gpus=4, sglang={"tp_size": None}), "must be the 4 GPUs"),  # which leaves SGLang its default: 1
        (serving(num_gpus=12), "--rollout-num-gpus-per-engine 8"),
        (serving(num_gpus=16, host="127.0.0.1"), "spans 2"),
        (serving(num_gpus=16, host="10.0.0.1"), "spans 2"),
    ],
)
def test_servers_that_contradict_each_other_are_refused(config: Config, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        check(config)


@pytest.mark.parametrize(
    "config",
    [
        serving(num_gpus=8, host="127.0.0.1"),
        serving(num_gpus=16),
        serving(num_gpus=16, host="0.0.0.0"),
        serving(num_gpus=4, sglang={"dp_size": 2}),
        serving(num_gpus=4, sglang={"tp_size": 2, "pp_size": 2}),
        serving(num_gpus=4, sglang={"tp_size": 4, "dp_size": 2, "enable_dp_attention": True}),
        serving(num_gpus=4, sglang={"dp_size": None, "pp_size": None}),
        serving(num_gpus=0, sglang={"tp_size": 2}),
        serving(router=True, router_args=("--policy", "random")),
        serving(num_engines=2, external_addrs=("a:1", "[::1]:1"), router_addr="b:1"),
    ],
)
def test_servers_that_fit_together_pass(config: Config) -> None:
    check(config)


def test_shared_memory_is_not_for_an_engine_of_several_nodes() -> None:
    trained = replace(
        serving(num_gpus=16),
        run=RunConfig(mode="train"),
        trainer=TrainerConfig(world_size=16, num_gpus=16),
    )
    with pytest.raises(ConfigError, match="--sglang-weight-transport distributed"):
        check(trained)
    check(replace(trained, sglang_server=SglangServerConfig(transport="distributed")))


def test_an_open_server_without_a_key_is_told_once() -> None:
    assert ["0.0.0.0" in note for note in notes(serving(host="0.0.0.0"))] == [True]
    assert not list(notes(serving(host="0.0.0.0", api_key_file="env:KEY")))
    assert not list(notes(serving(host="127.0.0.1")))
    assert not list(notes(serving()))


def test_settings_that_no_server_reads_are_told() -> None:
    (note,) = notes(serving(external_addrs=("a:1",), port=3, sglang={"mem_fraction_static": 0.7}))
    assert "--sglang-mem-fraction-static, sglang_server.port change nothing" in note
    assert not list(notes(serving(external_addrs=("a:1",), api_key_file="env:KEY")))
    embedded = RolloutConfig(engine="embedded")
    (note,) = notes(replace(serving(external_addrs=("a:1",), router=True), rollout=embedded))
    assert note.endswith("has no use for sglang_server.external_addrs, sglang_server.router.")


def test_servers_elsewhere_are_no_reason_to_reserve_nothing_for_an_engine_that_has_none() -> None:
    config = serving(num_gpus=1, external_addrs=("a:1",))
    assert num_reserved_gpus(config) == 0
    assert num_reserved_gpus(replace(config, rollout=replace(config.rollout, engine="embedded"))) == 1


@pytest.mark.parametrize(
    ("host", "loopback"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("node", False)]
)
def test_loopback_is_known_by_its_address(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
