"""Flags of an SGLang that is newer than the table: the installation that runs the servers is asked."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from slime_spec.errors import ConfigError
from slime_spec.launch.arguments import read_arguments
from slime_spec.launch.compose import compose

FLAGS = [
    {"dest": "warp_drive", "spellings": ["--warp-drive"], "takes_value": True},
    {"dest": "enable_shields", "spellings": ["--enable-shields"], "takes_value": False},
]


@pytest.fixture
def python(tmp_path: Path) -> str:
    """An interpreter whose SGLang has two flags that nobody else has."""
    path = tmp_path / "python"
    answer = json.dumps({"sglang": "0.9.0", "torch": "3.0.0", "flags": FLAGS, "router": None, "model_types": []})
    path.write_text(f"#!/bin/sh\necho 'SLIME_SPEC {answer}'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_flag_that_only_the_installed_version_has_goes_to_its_servers_as_it_is(python: str) -> None:
    argv = ["--sglang-warp-drive", "9", "8", "--sglang-python", python, "--sglang-enable-shields", "trainer.lr=1e-6"]
    config = compose(argv)
    assert config.sglang_server.extra_args == ("--warp-drive", "9", "8", "--enable-shields")
    assert config.trainer.lr == 1e-6


@pytest.mark.parametrize("spelled", ["--sglang-warp-drive=9", "--sglang_warp_drive=9"])
def test_it_is_spelled_like_any_other(spelled: str, python: str) -> None:
    arguments = read_arguments([f"--sglang-python={python}", spelled, "--sglang-extra-args=--enable-shields"])
    assert arguments.settings["sglang_server.extra_args"] == ("--enable-shields", "--warp-drive", "9")


def test_a_flag_that_neither_has_is_refused(python: str) -> None:
    with pytest.raises(ConfigError, match="--sglang-warp-drives: is not a flag"):
        read_arguments(["--sglang-python", python, "--sglang-warp-drives", "9"])


def test_nobody_is_asked_about_flags_that_the_table_has() -> None:
    arguments = read_arguments(["--sglang-python", "/nonexistent/python", "--sglang-attention-backend", "fa3"])
    assert arguments.settings["sglang.attention_backend"] == "fa3"
