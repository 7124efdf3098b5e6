"""The key of SGLang's servers is where its owner alone reads it (case sglang/11-key)."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rollout.sglang_engine import guard, keyed
from rollout.sglang_engine.client import ServerRefused, SglangClient
from rollout.sglang_engine.engine import SglangEngine
from slime_spec.config.api_key import VARIABLE, api_key_of, refuse_literal_keys
from slime_spec.config.build import to_yaml
from slime_spec.config.checks import check
from slime_spec.config.sglang_server import SglangServerConfig
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.launch.compose import compose
from slime_spec.run_folder import RunFolder
from slime_spec.sglang.arguments import config_of_engine
from slime_spec.sglang.server_info import ServerInfo
from slime_spec.types import GroupRequest, SamplingParams
from tests.support.pushes import DirectTransport

KEY = "TOPSECRET-1234567890"


def with_source(source: str | None) -> Config:
    return Config(sglang_server=SglangServerConfig(api_key_file=source))


def key_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "key"
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    "words",
    [
        ["--sglang-api-key", KEY],
        [f"--sglang-api-key={KEY}"],
        ["--sglang-admin-api-key", KEY],
        ["--sglang-ssl-keyfile-password", KEY],
        [f"--sglang-extra-args=--api-key={KEY}"],
        [f"sglang_server.extra_args=[--api-key,{KEY}]"],
        [f"--sglang-extra-args=--api-k={KEY}"],
        ["--sglang-router", f"--sglang-router-args=--api-key={KEY}"],
        ["--sglang-router", f"--sglang-router-args=--api={KEY}"],
        ["--sglang-router", f"sglang_server.router_args=[--control-plane-api-keys,'key1:me:admin:{KEY}']"],
        ["--sglang-api-key", KEY, "--rollout-engine", "embedded"],
    ],
)
def test_a_key_on_the_command_line_is_refused_and_not_repeated(words: Sequence[str]) -> None:
    base = ["--debug-rollout-only", "--hf-checkpoint", "models/none", "--rollout-engine", "sglang"]
    with pytest.raises(ConfigError, match="others can read it") as raised:
        compose([*base, *words])
    assert KEY not in str(raised.value)


def test_a_key_in_a_file_of_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"sglang:\n  api_key: {KEY}\n")
    with pytest.raises(ConfigError, match="others can read it") as raised:
        compose(["--config", str(path), "--hf-checkpoint", "models/none"])
    assert KEY not in str(raised.value)
    config = replace(Config(), sglang={"api_key": KEY})
    with pytest.raises(ConfigError, match="others can read it"):
        check(config)
    with pytest.raises(ConfigError, match="others can read it"):
        RunFolder.create(config, ["slime-spec"], to_yaml(config))


def test_a_key_in_the_flags_of_one_engine_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "engines.yaml"
    path.write_text(f"0:\n  api_key: {KEY}\n")
    with pytest.raises(ConfigError, match="others can read it") as raised:
        config_of_engine(Config(sglang_server=SglangServerConfig(overrides=str(path))), 0)
    assert KEY not in str(raised.value)


def test_the_file_of_a_certificates_key_is_no_secret() -> None:
    words = ("--ssl-keyfile", "key.pem", "--", "-v")
    refuse_literal_keys(Config(sglang_server=SglangServerConfig(extra_args=words)))
    with pytest.raises(ConfigError, match="others can read it"):
        refuse_literal_keys(Config(sglang_server=SglangServerConfig(extra_args=("--api-key", KEY, *words))))


def test_a_key_comes_from_a_file_or_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert api_key_of(with_source(None)) is None
    assert api_key_of(with_source(str(key_file(tmp_path, f"{KEY}\n")))) == KEY
    monkeypatch.setenv("MINE", KEY)
    assert api_key_of(with_source("env:MINE")) == KEY


@pytest.mark.parametrize(
    ("text", "mode", "rule"),
    [
        (KEY, 0o640, "by its owner alone; its mode is 0640"),
        (KEY, 0o604, "by its owner alone"),
        ("", 0o600, "one key"),
        (f"{KEY}\n{KEY}", 0o600, "one key"),
        ("caf\u00e9", 0o600, "one key"),
        ("two words", 0o600, "one key"),
    ],
)
def test_a_file_that_others_can_read_or_that_holds_no_key_is_refused(
    tmp_path: Path, text: str, mode: int, rule: str
) -> None:
    with pytest.raises(ConfigError, match=rule) as raised:
        api_key_of(with_source(str(key_file(tmp_path, text, mode))))
    assert not text or text not in str(raised.value)


@pytest.mark.parametrize("source", ["/nowhere/key", "env:SLIME_SPEC_NOT_SET", "a\0b", "."])
def test_a_source_without_a_key_is_refused(source: str) -> None:
    with pytest.raises(ConfigError, match=r"sglang_server\.api_key_file"):
        api_key_of(with_source(source))


def test_the_configuration_says_that_the_key_is_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a node whose environment lacks it is refused, and starts no open server."""
    words = ["--debug-rollout-only", "--hf-checkpoint", "models/none", "--rollout-engine"]
    monkeypatch.setenv(VARIABLE, KEY)
    config = compose([*words, "sglang"])
    assert config.sglang_server.api_key_file == f"env:{VARIABLE}"
    assert KEY not in to_yaml(config) + repr(config)
    assert compose([*words, "sglang", "--sglang-api-key-file", "/k"]).sglang_server.api_key_file == "/k"
    assert compose([*words, "embedded"]).sglang_server.api_key_file is None
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(ConfigError, match=f"env:{VARIABLE}"):
        api_key_of(config)


def test_what_a_server_reports_of_itself_is_kept_without_its_keys() -> None:
    info = ServerInfo.of({"version": "1", "api_key": KEY, "admin_api_key": KEY, "dtype": "float32"})
    assert info.flags == {"dtype": "float32"}


def test_both_scripts_mean_the_same_variable() -> None:
    assert guard.KEY_VARIABLE == keyed.KEY_VARIABLE


def test_a_running_servers_key_is_in_no_command_line_and_in_no_file_of_its_run(
    config: Config, monkeypatch: pytest.MonkeyPatch, process_path: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The fake writes its arguments into its log, as SGLang does."""
    monkeypatch.setenv("PYTHONPATH", process_path)
    source = str(key_file(tmp_path_factory.mktemp("key"), KEY))
    config = replace(config, sglang_server=replace(config.sglang_server, api_key_file=source))
    folder = RunFolder.create(config, ["slime-spec", "train", "--sglang-api-key-file", source], to_yaml(config)).path
    engine = SglangEngine(config, 0, DirectTransport())
    engine.start()
    try:
        request = GroupRequest("group", (5, 6, 7), (1,), SamplingParams(max_new_tokens=10))
        assert [len(sample.token_ids) for sample in engine.generate(request)] == [10]
        keyless = SglangClient(engine.client.url)
        engine.server.loop.call(keyless.open())
        with pytest.raises(ServerRefused, match="401"):
            engine.server.loop.call(keyless.get("/server_info"))
        engine.server.loop.call(keyless.close())
        assert [line for line in command_lines() if KEY in line] == []
    finally:
        engine.stop()
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert {"config.yaml", "command.txt", "sglang-0.log"} <= {path.name for path in written}
    assert [path for path in written if KEY.encode() in path.read_bytes()] == []
    log = folder / "engines" / "sglang-0.log"
    assert "'--api-key', '***'" in log.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def command_lines() -> list[str]:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().decode(errors="replace"))
        except OSError:  # it has ended
            continue
    assert lines
    return lines
