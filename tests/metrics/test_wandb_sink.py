"""An offline wandb run, read back from its file. Nothing here reaches for the network."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import wandb
from samples import sample
from wandb.proto import wandb_internal_pb2

from slime_spec.config.tree import Config, MetricsConfig, RunConfig
from slime_spec.errors import ConfigError
from slime_spec.metrics.jsonl import read_metrics
from slime_spec.metrics.log import MetricLog
from slime_spec.metrics.rollout import rollout_metrics
from slime_spec.metrics.step import perf_metrics, push_metrics, train_metrics
from slime_spec.metrics.wandb import chart_over, log_beside, mode, rows_of_panel, server_url
from slime_spec.run_folder import RunFolder
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
    kept = {int(row["step"] or 0): row for row in read_metrics(tmp_path / "metrics.jsonl")}
    panels = {name for row in logged.values() for name in row if name.startswith("panels/")}
    assert {step: {name: row[name] for name in row.keys() - panels} for step, row in logged.items()} == kept
    assert sorted(logged) == [0, 1, 2, 3, 4]
    assert {"rollout/spec_accept_rate", "spec/accept_rate_pos_0", "sync/checksum_ok"} <= logged[0].keys()

    runs = [record.run for file in files for record in records(file) if record.WhichOneof("record_type") == "run"]
    assert {run.run_id for run in runs} == {(tmp_path / "wandb_id.txt").read_text().strip()}
    assert {run.display_name for run in runs} == {"night"}
    told = {item.key: json.loads(item.value_json) for item in runs[0].config.update if item.key}
    assert told["trainer"]["lr"] == config.trainer.lr
    assert told["metrics"]["use_wandb"] is True


def test_a_run_that_resumes_from_an_earlier_step_goes_on_in_its_wandb_run_on_the_axis_of_its_own_steps(
    tmp_path: Path,
) -> None:
    config = Config(
        run=RunConfig(output_dir=str(tmp_path)),
        metrics=MetricsConfig(console=False, use_wandb=True, wandb_team="blue", report_interval=0),
    )
    for load, steps in ((None, range(4)), ("checkpoints", range(2, 5)), ("checkpoints", range(4, 6))):
        with RunFolder.create(config, ["x"], "a: 1\n", load) as folder:
            folder.begin_at(steps[0])
            with MetricLog.open(config, tmp_path) as log:
                for step in steps:
                    log.log(step, step_metrics(step))
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.parent.name)
    for file in files:
        wait_until_written(file)
    everything = [record for file in files for record in records(file)]
    runs = [record.run for record in everything if record.WhichOneof("record_type") == "run"]
    assert len(files) == 3
    assert len({run.run_id for run in runs}) == 1
    assert {run.entity for run in runs} == {"blue"}
    logged = [(own, row["step"]) for file in files for own, row in sorted(history(file).items())]
    assert logged == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 2), (5, 3), (6, 4), (7, 4), (8, 5)]
    axes = {each.glob_name or each.name: each.step_metric for each in metrics_defined(everything)}
    assert axes["*"] == axes["rollout/spec_accept_length"] == "step"


def metrics_defined(everything: list[wandb_internal_pb2.Record]) -> list[wandb_internal_pb2.MetricRecord]:
    return [record.metric for record in everything if record.WhichOneof("record_type") == "metric"]


def test_the_panels_of_several_metrics_have_the_values_of_metrics_jsonl(tmp_path: Path) -> None:
    config = Config(metrics=MetricsConfig(console=False, use_wandb=True, report_interval=0))
    with MetricLog.open(config, tmp_path) as log:
        for step in range(3):
            log.log(step, step_metrics(step))
    (file,) = tmp_path.glob("wandb/offline-run-*/files/media/table/panels/acceptance_by_position_table_*.json")
    table = json.loads(file.read_text())
    shown = {
        (row[columns["lineKey"]], row[columns["step"]]): row[columns["lineVal"]]
        for columns in [{name: at for at, name in enumerate(table["columns"])}]
        for row in table["data"]
    }
    kept = {
        (f"spec/accept_rate_cum_pos_{position}", row["step"]): row[f"spec/accept_rate_cum_pos_{position}"]
        for row in read_metrics(tmp_path / "metrics.jsonl")
        for position in range(3)
    }
    assert shown == kept


@pytest.mark.parametrize(("num_rows", "num_lines", "every"), [(3, 2, 1), (5000, 2, 1), (5001, 2, 2), (9000, 4, 4)])
def test_a_panel_of_a_long_run_has_as_many_points_as_wandb_keeps(num_rows: int, num_lines: int, every: int) -> None:
    steps = [int(row["step"] or 0) for row in rows_of_panel([{"step": float(n)} for n in range(num_rows)], num_lines)]
    assert len(steps) * num_lines <= 10_000
    assert {later - earlier for earlier, later in pairwise(steps)} == {every}
    assert steps[-1] == num_rows - 1


@pytest.mark.parametrize(
    ("host", "url"),
    [(None, None), ("https://wandb.ai/", "https://api.wandb.ai"), ("https://wandb.me.org/", "https://wandb.me.org")],
)
def test_the_site_that_a_browser_opens_stands_for_the_server(host: str | None, url: str | None) -> None:
    assert server_url(host) == url


def test_a_host_that_is_no_address_is_refused_and_a_servers_own_key_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be the URL of a wandb server"):
        server_url("wandb.me.org")
    netrc = tmp_path / "netrc"
    netrc.write_text("machine wandb.me.org login user password " + "0" * 40 + "\n")
    assert mode(None, {"NETRC": str(netrc)}, "https://wandb.me.org") == "online"
    assert mode(None, {"NETRC": str(netrc)}, "https://wandb.ai/") == "offline"


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


def test_values_stand_beside_what_another_framework_logs_of_a_step(tmp_path: Path) -> None:
    """As in the processes of slime and verl, which have a wandb run of their own."""
    log_beside(3, {"spec/verify_rounds": 1.0})  # no run: nothing happens
    chart_over("rollout/step", ["spec/*"])
    run = wandb.init(mode="offline", dir=str(tmp_path), settings=wandb.Settings(silent=True, console="off"))
    chart_over("rollout/step", ["spec/*"])
    log_beside(3, {"spec/verify_rounds": 8.0})
    wandb.log({"rollout/step": 3, "critic/score": 0.5}, step=3)
    folder = Path(run.dir).parent
    run.finish()
    (path,) = folder.glob("*.wandb")
    wait_until_written(path)
    assert history(path)[3] == {"spec/verify_rounds": 8.0, "rollout/step": 3, "critic/score": 0.5}
    axes = [each.metric for each in records(path) if each.WhichOneof("record_type") == "metric"]
    assert [each.step_metric for each in axes if each.glob_name == "spec/*"] == ["rollout/step"]
