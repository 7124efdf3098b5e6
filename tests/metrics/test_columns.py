"""What a terminal shows fits it, and 120 columns at most; the run's log keeps lines in one piece."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path

import pytest

from slime_spec.columns import columns, fitted
from slime_spec.launch.cli import StderrHandler, main
from slime_spec.metrics.summary import window_of
from slime_spec.run_log import RunLog

FACTS = [f"fact_{number}={number * 1111}" for number in range(30)]


def test_a_long_line_is_wrapped_between_its_facts_and_loses_none() -> None:
    table = "batch plain_ms\n    1     9.78"
    text = fitted(f"{table}\n{' '.join(FACTS)}", width=60)
    lines = text.split("\n")
    assert lines[:2] == table.split("\n")
    assert len(lines) > 4
    assert max(map(len, lines)) <= 60
    assert all(line.startswith("  fact_") for line in lines[3:])
    assert " ".join(lines[2:]).split() == FACTS


def test_a_word_that_is_longer_than_a_line_stays_whole() -> None:
    path = "/data/" + "x" * 200
    assert path in fitted(f"saved path={path} step=1").replace("\n", " ").replace("path=", "path= ").split()


def test_a_pipe_has_120_columns() -> None:
    assert columns() == 120


def test_the_terminal_wraps_a_line_of_the_log_that_the_file_has_in_one_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    logger, terminal = logging.getLogger("test_columns"), StderrHandler(120)
    logger.setLevel(logging.INFO)
    logging.getLogger().addHandler(terminal)
    try:
        with RunLog() as log:
            log.write_to(tmp_path / "run.log")
            logger.info("first prompt %s", " ".join(FACTS))
    finally:
        logging.getLogger().removeHandler(terminal)
    assert f"first prompt {' '.join(FACTS)}\n" in (tmp_path / "run.log").read_text()
    lines = written.getvalue().splitlines()
    assert max(map(len, lines)) <= 120
    assert " ".join(lines).split()[2:] == FACTS


def test_a_traceback_is_not_wrapped() -> None:
    terminal = StderrHandler(40)
    try:
        raise ValueError("a word " * 30)
    except ValueError:
        record = logging.LogRecord("name", logging.ERROR, __file__, 1, "failed", (), sys.exc_info())
    assert "ValueError: " + "a word " * 30 in terminal.format(record)


@pytest.mark.parametrize("words", [["train", "--help"], ["nonsense"], ["train", "--config", "nonsense"]])
def test_help_and_errors_fit_120_columns(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(words)
    printed = capsys.readouterr()
    lines = (printed.out + printed.err).splitlines()
    assert lines
    assert [line for line in lines if len(line) > 120] == []


def test_an_unknown_command_is_told_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 2
    assert "remedy: Did you mean --version? Choose one of these.\n" in capsys.readouterr().err


@pytest.mark.parametrize(("num_steps", "window"), [(1, 1), (2, 1), (3, 1), (8, 4), (10, 5), (100, 5)])
def test_the_ends_of_a_run_have_no_step_in_common_where_it_has_two(num_steps: int, window: int) -> None:
    assert window_of(num_steps) == window
