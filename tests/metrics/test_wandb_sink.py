"""An offline wandb run, read back from its file. Nothing here reaches for the network."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from samples import sample
from wandb.proto import wandb_internal_pb2

from slime_spec.config.tree import Config, MetricsConfig, RunConfig
from slime_spec.errors import ConfigError
from slime_spec.metrics.jsonl import read_metrics
from slime_spec.metrics.log import MetricLog
from slime_spec.metrics.rollout import rollout_metrics
from slime_spec.metrics.step import perf_metrics, push_metrics, train_metrics
from slime_spec.metrics.wandb import mode
from slime_spec.types import TrainReport
from slime_spec.weights.run import PushReport

BLOCK = 32 * 1024
FIRST_OR_MIDDLE = (2, 3)  # LevelDB's log: a record's fragments are FULL 1, FIRST 2, MIDDLE 3, LAST 4


def records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    """A .wandb file: 7 bytes of header, then LevelDB's log format (blocks of 32 KiB; CRC, length, type, data)."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, pending = 7, b""
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if position + 7 + length > len(data):
            return  # still being written
        pending += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind not in FIRST_OR_MIDDLE:
            yield wandb_internal_pb2.Record.FromString(pending)
            pending = b""


def wait_until_written(path: Path, deadline_s: float = 30.0) -> None:
    """wandb's own process writes the file and may still be at it when finish() returns; its last record is the exit."""
    end = time.monotonic() + deadline_s
    while not any(record.WhichOneof("record_type") == "exit" for record in records(path)):
        assert time.monotonic() < end, f"{path} has no exit record after {deadline_s} s"
        time.sleep(0.05)


def history(path: Path) -> dict[int, dict[str, float]]:
    rows: dict[int, dict[str, float]] = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            row = {name: json.loads(value) for name, value in items.items()}
            rows[row.pop("_step")] = {name: value for name, value in row.items() if not name.startswith("_")}
    return rows


@pytest.fixture(autouse=True)
def _without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No API key, no netrc, and a server that nobody listens on: reaching for the network would fail the test."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


def step_metrics(step: int) -> dict[str, float]:
    samples = [sample(reward=step / 4, histogram=(1, 2, 1)), sample(prompt_id=1, reward=0.0, histogram=(3, 1))]
    return {
        **rollout_metrics(samples),
        **train_metrics(TrainReport(0.1, 0.2, 1.5, 0.9, 0.01, 0.0, 1e-6 * (step + 1), 100, 75, 1, 4)),
        **push_metrics(PushReport(step + 1, seconds=0.5, nbytes=1000, num_tensors=7, checksum="ab", verified=True)),
        **perf_metrics(samples, {"rollout": 1.0, "train": 2.0, "sync": 0.5}, 4.0),
    }


def test_an_offline_run_says_what_metrics_jsonl_says_under_the_same_names_and_resumes_under_its_id(
    tmp_path: Path,
) -> None:
    config = Config(run=RunConfig(name="night"), metrics=MetricsConfig(console=False, use_wandb=True))
    for steps in (range(3), range(3, 5)):  # a run, and its resumption
        with MetricLog.open(config, tmp_path) as log:
            for step in steps:
                log.log(step, step_metrics(step))
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    for file in files:
        wait_until_written(file)
    logged = {step: row for file in files for step, row in history(file).items()}
    kept = {row.pop("step"): row for row in read_metrics(tmp_path / "metrics.jsonl")}
    assert logged == kept
    assert sorted(logged) == [0, 1, 2, 3, 4]
    assert {"rollout/spec_accept_rate", "spec/accept_rate_pos_0", "sync/checksum_ok"} <= logged[0].keys()

    runs = [record.run for file in files for record in records(file) if record.WhichOneof("record_type") == "run"]
    assert {run.run_id for run in runs} == {(tmp_path / "wandb_id.txt").read_text().strip()}
    assert {run.display_name for run in runs} == {"night"}
    told = {item.key: json.loads(item.value_json) for item in runs[0].config.update if item.key}
    assert told["trainer"]["lr"] == config.trainer.lr
    assert told["metrics"]["use_wandb"] is True


def test_the_mode_follows_the_setting_then_the_environment_then_the_key(tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password " + "0" * 40 + "\n")
    nowhere = {"NETRC": str(tmp_path / "no-netrc")}
    assert mode(None, nowhere) == "offline"
    assert mode(None, {**nowhere, "WANDB_API_KEY": "0" * 40}) == "online"
    assert mode(None, {"NETRC": str(netrc)}) == "online"
    assert mode(None, {"NETRC": str(netrc), "WANDB_BASE_URL": "https://wandb.example.org"}) == "offline"
    assert mode(None, {"NETRC": str(netrc), "WANDB_MODE": "disabled"}) == "disabled"
    assert mode("offline", {"WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}) == "offline"
    netrc.write_text("machine")
    assert mode(None, {"NETRC": str(netrc)}) == "offline"


def test_a_mode_that_wandb_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be online, offline or disabled"):
        mode(None, {"WANDB_MODE": "dryrun"})
