"""Servers that someone else started: used where they serve this run's model, and refused where they do not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rollout.sglang_engine.fake import FakeServer
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.ports import free_port
from tests.sglang.conftest import Checkpoints, Connect
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
