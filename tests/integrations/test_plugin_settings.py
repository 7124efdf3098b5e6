"""A plug-in's settings come with slime's args or from a file, and all mistakes in them are told at once."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from slime_spec.errors import ConfigError, ConfigErrors
from slime_spec.integrations.framework import SLIME, first_of, own_generate
from slime_spec.integrations.settings import PluginSettings, plugin_settings, read_block


def test_the_block_of_slimes_own_file_is_an_attribute_of_its_args(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLIME_SPEC_PLUGIN", raising=False)
    assert plugin_settings(Namespace()) == PluginSettings()
    block = {"canary_prompts": 2, "break_even_length": 2, "servers": ["10.0.0.1:30000"], "generate": "my.generate"}
    read = plugin_settings(Namespace(slime_spec=block))
    assert (read.canary_prompts, read.break_even_length, read.servers) == (2, 2.0, ("10.0.0.1:30000",))
    assert (read.generate, read.feed_replies) == ("my.generate", True)


def test_a_file_of_its_own_serves_a_launch_without_slimes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugin.yaml").write_text("slime_spec:\n  canary_tokens: 8\n")
    monkeypatch.setenv("SLIME_SPEC_PLUGIN", str(tmp_path / "plugin.yaml"))
    assert plugin_settings(Namespace()).canary_tokens == 8
    assert plugin_settings(Namespace(slime_spec={"canary_tokens": 9})).canary_tokens == 9  # slime's wins
    monkeypatch.setenv("SLIME_SPEC_PLUGIN", str(tmp_path / "nothing.yaml"))
    with pytest.raises(ConfigError, match=r"nothing\.yaml"):
        plugin_settings(Namespace())


def test_all_mistakes_of_a_block_are_told_with_what_was_meant() -> None:
    with pytest.raises(ConfigErrors) as caught:
        read_block({"canary_promts": 2, "canary_drop": 2.0, "feed_replies": "yes"})
    told = str(caught.value)
    assert "Did you mean slime_spec.canary_prompts?" in told
    assert "slime_spec.canary_drop: must be at most 1 (got 2.0)" in told
    assert "slime_spec.feed_replies: must be true or false" in told
    with pytest.raises(ConfigError, match="must be a group of settings"):
        read_block(["canary_prompts"])


def test_a_framework_that_is_not_installed_is_named() -> None:
    paths = ("no_such_framework.rollout.generate", "no_such_framework.other.generate")
    with pytest.raises(ConfigError, match=r"slime: must have one of the functions .* Install slime"):
        first_of(SLIME.name, paths)
    with pytest.raises(ConfigError, match=r"slime_spec.generate: must name a function"):
        own_generate("no_such_module.generate")


def test_importing_the_hooks_loads_nothing_heavy() -> None:
    code = "import slime_spec.integrations.slime, slime_spec.integrations.miles, sys; print(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "ray", "aiohttp", "sglang", "megatron", "wandb", "transformers", "slime"} & set(loaded)
