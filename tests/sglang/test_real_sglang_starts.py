"""Servers of the real SGLang that cannot start: one clear error each, with the log's end and the likely cause."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rollout.sglang_engine.engine import SglangEngine
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from tests.support.pushes import DirectTransport
from tests.support.sglang_checkpoints import make_draft, make_target
from tests.support.sglang_real import Models, cpu_environment

pytestmark = [pytest.mark.long, pytest.mark.sglang_server]


@pytest.fixture(autouse=True)
def _on_the_cpu() -> Iterator[None]:
    with cpu_environment():
        yield


def refusal(config: Config) -> str:
    """What a user reads who starts an engine with it; no server is left."""
    with pytest.raises(ConfigError) as caught:
        SglangEngine(config, 0, DirectTransport()).start()
    return str(caught.value)


def with_server(config: Config, **settings: Any) -> Config:
    return replace(config, sglang_server=replace(config.sglang_server, **settings))


def with_flags(config: Config, **flags: Any) -> Config:
    return replace(config, sglang={**config.sglang, **flags})


@pytest.fixture
def plain(models: Models, tmp_path: Path) -> Config:
    return models.config("NONE", tmp_path / "run")


def test_a_draft_folder_that_is_not_there_is_refused_before_anything_starts(models: Models, tmp_path: Path) -> None:
    config = models.config("EAGLE3", tmp_path / "run")
    told = refusal(replace(config, speculative=replace(config.speculative, draft_model_path="/no/such/draft")))
    assert "/no/such/draft" in told
    assert "must be a checkpoint folder" in told
    assert not (tmp_path / "run" / "engines").exists()


def test_a_draft_of_another_target_is_named_as_the_likely_cause(models: Models, tmp_path: Path) -> None:
    """Its tensors are whole, only not for this target's hidden size: the server finds out when it loads it."""
    wide = make_target(tmp_path / "wide", hidden_size=96)
    draft = make_draft(tmp_path / "draft", wide, "EAGLE3", hidden_size=96, target_hidden_size=96)
    config = models.config("EAGLE3", tmp_path / "run")
    told = refusal(replace(config, speculative=replace(config.speculative, draft_model_path=str(draft))))
    assert "The SGLang server ended with exit code" in told
    assert "Likely cause: the draft does not fit the target" in told


def test_a_flag_that_this_version_does_not_have_is_refused_before_anything_starts(
    plain: Config, tmp_path: Path
) -> None:
    told = refusal(with_flags(plain, mem_fraction_statik=0.5))
    assert "is no flag of SGLang 0.5.21" in told
    assert "mem_fraction_static" in told, "what was meant"
    told = refusal(with_server(plain, extra_args=("--no-such-flag",)))
    assert "--no-such-flag is no flag of SGLang 0.5.21" in told
    assert not (tmp_path / "run" / "engines").exists()


def test_a_port_in_use_is_refused_before_anything_starts(plain: Config, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        told = refusal(with_server(plain, port=port))
    assert "must be free on 127.0.0.1" in told
    assert str(port) in told
    assert not (tmp_path / "run" / "engines").exists()


def test_a_server_that_ends_at_once_shows_its_log(plain: Config) -> None:
    told = refusal(with_flags(plain, attention_backend="flashinfer"))
    assert "The SGLang server ended with exit code" in told
    assert "The end of" in told
    assert "sglang-0.log" in told
    assert "Traceback" in told


def test_a_server_that_never_becomes_healthy_is_ended_after_the_timeout(plain: Config) -> None:
    told = refusal(with_server(plain, start_timeout_s=2.0))
    assert "The SGLang server was not healthy after 2 s (--sglang-start-timeout)" in told
