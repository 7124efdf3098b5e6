"""Event files, read back by TensorBoard's own reader."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slime_spec.config.tree import Config, MetricsConfig
from slime_spec.metrics.jsonl import read_metrics
from slime_spec.metrics.log import MetricLog
from slime_spec.metrics.tensorboard import TensorBoardSink


def config(**more: object) -> Config:
    metrics = {"console": False, "report_interval": 0, "use_tensorboard": True, **more}
    return Config(metrics=MetricsConfig(**metrics))  # type: ignore[arg-type]


def events(folder: Path) -> EventAccumulator:
    reader = EventAccumulator(str(folder))
    reader.Reload()
    return reader


def test_the_scalars_are_those_of_metrics_jsonl_at_the_same_steps(tmp_path: Path) -> None:
    with MetricLog.open(config(), tmp_path) as log:
        for step in range(3):
            log.log(step, {"rollout/reward_mean": step / 4, "spec/accept_rate_pos_0": 0.1 * step})
    reader = events(tmp_path / "tensorboard")
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert set(reader.Tags()["scalars"]) == {name for row in rows for name in row} - {"step"}
    for name in reader.Tags()["scalars"]:
        read = [(event.step, event.value) for event in reader.Scalars(name)]
        assert read == [(row["step"], pytest.approx(row[name], rel=1e-7)) for row in rows]  # single precision


def test_the_configuration_is_among_the_texts(tmp_path: Path) -> None:
    asked = config(tensorboard_dir=str(tmp_path / "elsewhere"))
    with MetricLog.open(asked, tmp_path) as log:
        log.log(0, {"rollout/reward_mean": 0.5})
    reader = events(tmp_path / "elsewhere")
    (text,) = reader.Tensors("config")[0].tensor_proto.string_val
    assert f'    run:\n      name: "{asked.run.name}"\n' in text.decode(), "Markdown's code, as it is indented"
    assert reader.summary_metadata["config"].plugin_data.plugin_name == "text"


def test_of_a_step_that_a_resumed_run_repeats_the_reader_keeps_the_second_value(tmp_path: Path) -> None:
    for steps, value in ((range(4), 1.0), (range(2, 6), 2.0)):
        sink = TensorBoardSink(tmp_path, "a: 1\n")
        for step in steps:
            sink.write(step, {"train/loss": value})
        sink.close()
        for (
            file
        ) in tmp_path.iterdir():  # files are read in the order of their names, which tell seconds: make it theirs
            file.rename(file.with_name(file.name.replace("tfevents.", "tfevents.0", 1)))
    read = [(event.step, event.value) for event in events(tmp_path).Scalars("train/loss")]
    assert read == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0), (5, 2.0)]


def test_values_that_single_precision_does_not_hold_stay_what_they_are(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, "a: 1\n")
    sink.write(0, {"train/loss": 1e300, "train/grad_norm": math.nan, "train/entropy": -1e300})
    sink.close()
    reader = events(tmp_path)
    values = {name: reader.Scalars(name)[0].value for name in reader.Tags()["scalars"]}
    assert (values["train/loss"], values["train/entropy"]) == (math.inf, -math.inf)
    assert math.isnan(values["train/grad_norm"])


def test_without_the_package_the_launch_is_refused_by_the_extra_that_brings_it(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()  # a package without the module, as where another of the name is installed
    (tmp_path / "tensorboard" / "__init__.py").write_text("")
    code = (
        "import json; from slime_spec.errors import ConfigError\n"
        "from slime_spec.metrics.tensorboard import event_writer\n"
        "try: event_writer()\n"
        "except ConfigError as error: print(json.dumps([error.setting, error.remedy]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    setting, remedy = json.loads(done.stdout)
    assert setting == "metrics.use_tensorboard"
    assert "pip install 'slime_spec[tensorboard]'" in remedy
