"""The command slime-spec report, and the page that a run writes of itself."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from slime_spec.config.tree import Config, MetricsConfig
from slime_spec.errors import ConfigError
from slime_spec.launch.cli import main
from slime_spec.launch.report import read_options, run_report
from slime_spec.metrics.log import MetricLog
from slime_spec.metrics.report import ReportSink
from tests.support.report_runs import row, run_folder


def test_a_page_is_written_into_the_runs_folder_or_where_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = (run_folder(tmp_path / name, [row(0)]) for name in ("one", "two"))
    assert main(["report", str(one)]) == 0
    assert capsys.readouterr().out == f"{one / 'report.html'}\n"
    assert "<title>one – slime_spec</title>" in (one / "report.html").read_text()
    assert main(["report", str(one), str(two / "metrics.jsonl")]) == 0
    assert "<title>one, two – slime_spec</title>" in (tmp_path / "report.html").read_text()
    assert main(["report", str(two), "--out=mine.html", "--open", "no"]) == 0
    assert (tmp_path / "mine.html").is_file()


def test_the_page_needs_nothing_heavy(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "mine", [row(0)])
    code = "import sys; from slime_spec.launch.cli import main; main(sys.argv[1:]); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "report", str(folder)], capture_output=True, text=True, check=True
    )
    assert not {"torch", "ray", "megatron", "wandb", "transformers", "tensorboard"} & set(done.stdout.split())


def test_a_watched_run_is_written_until_it_ends(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "mine", [row(0)])
    script = (
        "import sys; from pathlib import Path; from slime_spec.folder_lock import FolderLock\n"
        "lock = FolderLock(Path(sys.argv[1]), 'run.name'); print('locked', flush=True); input()"
    )
    seen: list[bool] = []
    waited: list[float] = []
    command = [sys.executable, "-c", script, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"

        def sleep(seconds: float) -> None:
            waited.append(seconds)
            seen.append('id="live"' in (folder / "report.html").read_text())
            if len(waited) == 2:
                process.kill()
                process.wait()

        assert run_report([str(folder), "--watch", "3"], lambda text: None, sleep) == 0
    assert (waited, seen) == ([3.0, 3.0], [True, True])
    assert 'id="live"' not in (folder / "report.html").read_text()


def test_two_that_write_one_page_leave_it_whole_at_all_times(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "mine", [row(0)])
    code = (
        "import sys; from slime_spec.launch.report import run_report\n"
        "for _ in range(20): run_report(sys.argv[1:], lambda text: None)"
    )
    run_report([str(folder)], lambda text: None)
    with subprocess.Popen([sys.executable, "-c", code, str(folder)]) as other:
        while other.poll() is None:
            run_report([str(folder)], lambda text: None)
            assert (folder / "report.html").read_text().endswith("</html>")
    assert other.returncode == 0
    assert list(folder.glob(".report*")) == []


@pytest.mark.parametrize(
    ("argv", "rule"),
    [
        ([], "needs a run's folder"),
        (["nowhere"], "must be there"),
        (["mine", "--out"], "needs a value"),
        (["mine", "--out", "no/such/folder.html"], "must be a file in a folder that is there"),
        (["mine", "--open", "maybe"], "must be yes or no"),
        (["mine", "--watch=0"], "must be seconds between"),
        (["mine", "--lr", "3"], "is no flag of slime-spec report"),
        ([".", "--out", "page.html"], "must be the folder of a run"),
    ],
)
def test_a_mistake_is_refused(argv: list[str], rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "mine", [row(0)])
    with pytest.raises(ConfigError, match=rule):
        run_report(argv, lambda text: None)


def test_watch_takes_the_next_word_where_it_is_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "mine", [row(0)])
    assert read_options(["--watch", "mine"]).watch_s == 10.0
    assert read_options(["--watch", "2.5", "mine"]).watch_s == 2.5
    assert read_options(["mine"]).watch_s is None


def test_a_run_writes_its_page_after_the_first_step_every_few_steps_and_at_its_end(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "mine", [])
    page = folder / "report.html"
    config = Config(metrics=MetricsConfig(console=False, report_interval=3))
    said: list[str] = []
    with MetricLog.open(config, folder) as log:
        for step in range(4):
            log.log(step, {"rollout/reward_mean": 0.5, "perf/step_time": 1.0})
            said.append(page.read_text().partition(" of 4 steps")[0].rpartition(">")[2])
        assert 'id="live"' in page.read_text()
    assert said[0] == "1", "after the first step"
    assert "4 of 4 steps, finished" in page.read_text()
    assert 'id="live"' not in page.read_text()


def test_pages_are_written_at_the_interval_and_less_often_where_they_take_long(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "mine", [row(0)])
    page = folder / "report.html"

    def written_at(times: Iterator[float]) -> list[int]:
        sink = ReportSink(folder, 2, lambda: next(times))
        steps = []
        for step in range(6):
            page.unlink(missing_ok=True)
            sink.write(step, {})
            steps += [step] if page.exists() else []
        return steps

    assert written_at(_clock(page_s=0.1, step_s=10.0)) == [0, 1, 3, 5]
    assert written_at(_clock(page_s=9.0, step_s=10.0)) == [0]


def _clock(page_s: float, step_s: float) -> Iterator[float]:
    """Seconds as the sink asks for them: once at its start, then before and after a page, steps lying between."""
    now = 0.0
    yield now
    while True:
        now += step_s
        yield now  # whether there is time for a page
        yield now
        now += page_s
        yield now


def test_a_page_that_cannot_be_written_is_one_warning_and_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run_folder(tmp_path / "mine", [row(0)])
    (folder / "report.html").mkdir()
    sink = ReportSink(folder, 1)
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            sink.write(step, {})
        sink.close()
    assert [record.message.partition(" path=")[0] for record in caplog.records] == ["report not written"]


def test_a_run_that_is_asked_for_no_page_writes_none(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "mine", [])
    with MetricLog.open(Config(metrics=MetricsConfig(console=False, report_interval=0)), folder) as log:
        log.log(0, {"rollout/reward_mean": 0.5})
    assert not (folder / "report.html").exists()
