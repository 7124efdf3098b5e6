"""metrics.jsonl and the console."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from samples import disk_of, sample

from slime_spec.config.tree import Config, MetricsConfig
from slime_spec.errors import ConfigError
from slime_spec.interfaces import SINKS, load_choice
from slime_spec.launch.cli import StderrHandler
from slime_spec.metrics.console import LINE, ConsoleSink, step_line, summary
from slime_spec.metrics.examples import Examples
from slime_spec.metrics.jsonl import JsonlSink, read_metrics
from slime_spec.metrics.log import MetricLog
from slime_spec.run_log import RunLog

STEP = {
    "rollout/reward_mean": 0.3125,
    "rollout/response_len_mean": 18.25,
    "rollout/spec_accept_rate": 0.351,
    "rollout/spec_accept_length": 1.872,
    "train/train_rollout_logprob_abs_diff": 2.13e-6,
    "perf/tokens_per_s": 812.4,
    "perf/rollout_time": 4.12,
    "perf/train_time": 25.3,
    "perf/sync_time": 0.31,
    "rollout/num_excluded": 0.0,
}


def test_the_log_gives_every_sink_the_same_values_and_jsonl_is_always_among_them(tmp_path: Path) -> None:
    with MetricLog.open(Config(metrics=MetricsConfig(console=False)), tmp_path) as log:
        log.log(0, STEP)
        assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0, **STEP}]


def test_lines_that_were_logged_survive_a_kill(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from slime_spec.metrics.jsonl import JsonlSink\n"
        "sink = JsonlSink(Path(sys.argv[1]))\n"
        "for step in range(3): sink.write(step, {'train/loss': step / 3})\n"
        "print('logged', flush=True); time.sleep(600)"
    )
    path = tmp_path / "metrics.jsonl"
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "logged\n"
        os.kill(process.pid, signal.SIGKILL)
    assert [row["train/loss"] for row in read_metrics(path)] == [0.0, 1 / 3, 2 / 3]


def test_a_full_disk_is_one_clear_error_and_the_resumed_run_goes_on_with_whole_lines(tmp_path: Path) -> None:
    """Case audit/72."""
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    long_row = {f"rollout/reward_mean/{task}": 0.123456 for task in range(9)}
    with disk_of(1000):
        for step in range(3):  # some 300 bytes each
            sink.write(step, long_row)
        with pytest.raises(ConfigError, match=r"metrics\.jsonl: must be writable: File too large"):
            sink.write(3, long_row)
    sink.close()
    resumed = JsonlSink(path)
    resumed.write(3, {"train/loss": 0.5})
    resumed.close()
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2, 3]


def test_a_line_that_a_killed_run_left_unfinished_blocks_no_reader_and_no_resumed_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Case audit/72."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "train/loss": 1.5}\n{"step": 1, "train/lo')
    assert read_metrics(path) == [{"step": 0, "train/loss": 1.5}]
    sink = JsonlSink(path)
    sink.write(1, {"train/loss": 0.25})
    sink.close()
    assert read_metrics(path) == [{"step": 0, "train/loss": 1.5}, {"step": 1, "train/loss": 0.25}]
    assert "cut off an unfinished last line" in caplog.text


@pytest.mark.parametrize(
    "line", ["{", "[1]", '{"step": "1"}', '{"step": true}', '{"step": 1, "a": "b"}', '{"step": 1' + "0" * 5000 + "}"]
)
def test_a_line_within_the_file_that_is_no_row_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:2"):
        read_metrics(path)


def test_what_is_not_finite_becomes_null_so_that_every_line_is_json(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(0, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/entropy": 0.5})
    sink.close()

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {"step": 0, "train/loss": None, "train/grad_norm": None, "train/entropy": 0.5}


def test_a_resumed_run_appends_and_its_repeated_steps_count(tmp_path: Path) -> None:
    for steps, loss in (((0, 1, 2), 1.0), ((2, 3), 2.0)):
        sink = JsonlSink(tmp_path / "metrics.jsonl")
        for step in steps:
            sink.write(step, {"train/loss": loss})
        sink.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["train/loss"]) for row in rows] == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0)]


def test_a_step_is_one_line_of_facts() -> None:
    assert step_line(2, 40, STEP) == (
        "finished step=3/40 reward=0.312 len=18.2 accept_rate=0.351 accept_len=1.87 logprob_diff=2.1e-06 "
        "tokens_per_s=812 rollout=4.1s train=25.3s sync=0.31s"
    )
    assert step_line(0, 1, {"rollout/reward_mean": 0.5, "rollout/num_excluded": 2.0}).endswith(
        "reward=0.500 excluded=2"
    )


def test_without_a_terminal_the_console_writes_plain_lines_and_a_table_at_the_end() -> None:
    written = io.StringIO()
    sink = ConsoleSink(2, Console(file=written, width=60))
    for step in range(2):
        sink.progress("rollout", 3, 8)
        sink.write(step, {**STEP, "rollout/reward_mean": 0.25 + step})
    lines = written.getvalue().splitlines()
    assert lines[0].startswith("finished step=1/2 reward=0.250 ")
    assert len(lines) == 4, "progress is for terminals; a step takes two lines of 120 columns"
    assert "\x1b" not in written.getvalue()
    sink.close()
    assert "rollout/reward_mean" in written.getvalue()


def test_the_runs_log_has_the_line_of_a_step_and_the_terminal_has_it_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, terminal = logging.getLogger(), StderrHandler()
    root.addHandler(terminal)
    before = root.level
    try:
        root.setLevel(logging.INFO)
        with RunLog() as log:
            log.write_to(tmp_path / "run.log")
            sink = ConsoleSink(2, Console(stderr=True, width=200))
            sink.write(0, STEP)
            sink.close()
    finally:
        root.setLevel(before)
        root.removeHandler(terminal)
    assert "finished step=1/2 reward=0.312" in (tmp_path / "run.log").read_text()
    assert capsys.readouterr().err.count("finished step=1/2") == 1


EVERY_FACT = {name: 12345.678 for name, _, _ in LINE}


@pytest.mark.parametrize(("columns", "is_terminal"), [(80, True), (120, True), (200, True), (60, False)])
def test_lines_fit_the_terminal_and_120_columns_and_break_no_fact(columns: int, is_terminal: bool) -> None:
    written = io.StringIO()
    console = Console(file=written, width=columns, force_terminal=is_terminal, color_system=None)
    sink = ConsoleSink(99_999, console)
    sink.write(99_998, EVERY_FACT)
    said = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "\n", written.getvalue()).splitlines()]
    start = next(number for number, line in enumerate(said) if line.startswith("finished "))
    parts = [line for line in said[start:] if "=" in line]
    assert max(map(len, parts)) <= (min(columns, 120) if is_terminal else 120)
    assert " ".join(part.strip() for part in parts) == step_line(99_998, 99_999, EVERY_FACT)
    assert all(part.startswith("  ") for part in parts[1:])
    sink.close()


@pytest.mark.parametrize("columns", [80, 120])
def test_the_tables_at_the_end_of_a_run_fit_the_terminal(columns: int) -> None:
    written = io.StringIO()
    console = Console(file=written, width=columns, force_terminal=True, color_system=None)
    console.print(summary({step: EVERY_FACT for step in range(10)}))
    samples = [sample(prompt_id, reward=0.5) for prompt_id in range(3)]
    with Examples(True, console) as examples:
        examples.see(0, samples)
        examples.see(9, [replace(each, text="a long reply " * 40) for each in samples])
    lines = written.getvalue().splitlines()
    assert max(map(len, lines)) <= columns
    assert [name for name, _, _ in LINE if not any(name in line for line in lines)] == []


def test_the_evaluation_of_the_end_is_no_step_of_the_console() -> None:
    written = io.StringIO()
    sink = ConsoleSink(1, Console(file=written, width=60))
    sink.write(0, STEP)
    sink.write(1, {"eval/aime": 0.5})
    sink.close()
    assert written.getvalue().count("finished") == 1
    assert "1 steps" in written.getvalue()


def test_on_a_terminal_the_console_shows_the_steps_and_the_phase_that_runs() -> None:
    written = io.StringIO()
    sink = ConsoleSink(4, Console(file=written, width=100, force_terminal=True, color_system=None))
    sink.progress("rollout", 3, 8)
    sink.write(0, STEP)
    sink.close()
    shown = written.getvalue()
    assert "3/8" in shown
    assert "1/4" in shown
    assert "finished step=1/4 reward=0.312" in shown


def test_the_final_table_compares_the_first_steps_with_the_last() -> None:
    rows = {step: {"rollout/reward_mean": step / 10} for step in range(10)}
    written = io.StringIO()
    Console(file=written, width=80).print(summary(rows))
    row = next(line for line in written.getvalue().splitlines() if "rollout/reward_mean" in line)
    assert "0.200" in row
    assert "0.700" in row


def test_every_sink_of_the_table_can_be_opened_written_and_closed(tmp_path: Path) -> None:
    for name in SINKS.keys() - {"wandb"}:
        sink = load_choice("metrics", SINKS, name).open(Config(), tmp_path)
        sink.write(0, STEP)
        sink.close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0]


def test_an_unknown_metric_reaches_no_sink(tmp_path: Path) -> None:
    with MetricLog.open(Config(metrics=MetricsConfig(console=False)), tmp_path) as log:
        with pytest.raises(ConfigError):
            log.log(0, {**STEP, "train/los": 1.0})
        assert read_metrics(tmp_path / "metrics.jsonl") == []
