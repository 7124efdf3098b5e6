"""Servers that someone else started: used where they serve this run's model, and refused where they do not."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rollout.sglang_engine.engine import SglangEngine
from rollout.sglang_engine.fake import FakeServer, serving
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.ports import free_port
from slime_spec.site import Site
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams
from slime_spec.weights.messages import BeginPush, PushMessage, PushReply
from slime_spec.weights.run import run_push
from tests.sglang.conftest import Checkpoints, Connect, OnFake
from tests.support.pushes import DirectTransport, other_weights, push_of
from tests.support.sglang_checkpoints import make_target
from tests.support.tiny_drafts import edit_config


def told(model: dict[str, Any] | None = None, **server_args: Any) -> FakeServer:
    """A server that says this of itself."""
    server = FakeServer()
    server.model, server.server_args = model or {}, server_args
    return server


def test_a_server_of_the_same_model_is_used_wherever_its_folder_is(connect: Connect, checkpoints: Checkpoints) -> None:
    architecture = json.loads((checkpoints.target / "config.json").read_text())["architectures"]
    there = {"model_path": "/a/folder/of/another/machine", "architectures": architecture}
    assert len(connect(told(there, speculative_algorithm="EAGLE3")).generate()) == 1
    assert len(connect(told({"model_path": str(checkpoints.target)})).generate()) == 1


def test_a_server_of_another_architecture_is_refused(connect: Connect) -> None:
    with pytest.raises(ConfigError, match=r"architecture Qwen2ForCausalLM where that has LlamaForCausalLM"):
        connect(told({"model_path": "/elsewhere", "architectures": ["Qwen2ForCausalLM"]}))


@pytest.mark.parametrize(("name", "value"), [("vocab_size", 128), ("num_hidden_layers", 7)])
def test_a_server_of_another_size_is_refused_where_its_folder_can_be_read(
    connect: Connect, tmp_path: Path, name: str, value: int
) -> None:
    other = edit_config(make_target(tmp_path / "other"), **{name: value})
    with pytest.raises(ConfigError, match=f"has {name} {value} where that has"):
        connect(told({"model_path": str(other)}))


def test_a_server_that_speculates_otherwise_is_refused(connect: Connect, config: Config) -> None:
    with pytest.raises(ConfigError, match="was started with NGRAM"):
        connect(told(speculative_algorithm="NGRAM"))
    with pytest.raises(ConfigError, match="--speculative-algorithm NONE"):
        connect(told(speculative_algorithm=None))
    eagle = replace(config, speculative=replace(config.speculative, algorithm="EAGLE"))
    connect(told(speculative_algorithm="EAGLE"), eagle)


def test_a_server_that_is_not_there_is_refused(connect: Connect, config: Config) -> None:
    with pytest.raises(ConfigError, match="must answer"):
        connect(external_addrs=(f"127.0.0.1:{free_port('127.0.0.1')}",))


def cache_keys(on_fake: OnFake) -> set[str]:
    """The keys under which the server has cached prefixes."""
    return {body["extra_key"] for body in on_fake.server.told("/generate")}


def test_no_two_weights_share_a_key_of_the_servers_prefix_cache(
    connect: Connect, checkpoints: Checkpoints, config: Config
) -> None:
    """Case sglang/04-external: a server that outlives its run keeps what it has cached, and versions begin anew."""
    server = FakeServer(delay_s=0.01)
    with serving(server) as address:
        told: list[set[str]] = []
        for seed in (1, 2):
            on_fake = connect(server, external_addrs=(address,))
            for version in (0, 1, 1):  # nothing pushed yet, a push, and a repeated push of other weights
                server.calls.clear()
                if version:
                    weights = other_weights(checkpoints.target, seed=10 * seed + len(told))
                    on_fake.push(push_of(weights, version), pause_mode="in_place")
                    assert not any(body["flush_cache"] for body in server.told("/update_weights_from_tensor"))
                on_fake.generate(4)
                on_fake.generate(4)
                told.append(cache_keys(on_fake))
    assert [len(keys) for keys in told] == [1] * 6, "requests for the same weights share what is cached"
    assert len(set[str]().union(*told)) == 6


def test_a_request_that_waits_for_the_end_of_a_pause_does_not_use_what_older_weights_cached(
    connect: Connect, checkpoints: Checkpoints
) -> None:
    on_fake = connect()
    on_fake.generate(4)
    messages = push_of(checkpoints.target_weights(), 1)
    waiting: list[Iterable[GeneratedSample]] = []

    def deliver(message: PushMessage) -> list[PushReply]:
        if isinstance(message, BeginPush):
            request = GroupRequest("waits", (5, 6, 7), (1,), SamplingParams(max_new_tokens=4))
            waiting.append(on_fake.engine.generate(request))
        return [on_fake.engine.update_weights(message)]

    run_push(messages, deliver, pause_mode="in_place")
    (sample,) = waiting[0]
    assert sample.weight_version == 1
    on_fake.generate(4)
    assert len(cache_keys(on_fake)) == len(on_fake.server.told("/generate")) == 3


def test_the_engines_of_one_run_share_what_their_router_has_cached(connect: Connect, config: Config) -> None:
    """A router may send a request of one engine to another engine's server."""
    keys = []
    for index in range(2):
        with serving(FakeServer()) as address:
            settings = replace(config.sglang_server, external_addrs=(address,) * 2)
            engine = SglangEngine(replace(config, sglang_server=settings), index, DirectTransport(), Site(run="a run"))
            engine.start()
            keys.append(engine.weights.cache_key)
            engine.stop()
    assert keys[0] == keys[1]
