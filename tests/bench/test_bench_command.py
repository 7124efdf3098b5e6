"""``slime-spec bench``: what it refuses, what it writes, how it ends."""

import json
from pathlib import Path

import pytest

from slime_spec.bench import run_bench
from slime_spec.bench.main_job import PARTS
from slime_spec.errors import ConfigError
from slime_spec.launch.cli import main
from tests.bench.made_up_run import steps, write_run

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("argv", "setting", "says"),
    [
        (["main-jbo"], "bench", "Did you mean 'main-job'?"),
        (["main-job", "--only", "enigne"], "--only", "Did you mean 'engine'?"),
        (["main-job", "--rnds", "3"], "slime-spec bench main-job", "--rnds"),
        (["main-job", "--seeds", "zero"], "slime-spec bench main-job", "zero"),
        (["main-job", "--rounds", "0"], "--rounds", "at least 1"),
        (["main-job", "--new-tokens", "1"], "--new-tokens", "at least 2"),
        (["main-job", "--json", "/nowhere/rows.json"], "--json", "folder that is there"),
        (["main-job", "--only", "engine", "--model", "/nowhere"], "model.hf_checkpoint", "models fetch smollm2-135m"),
        (["main-job", "--only", "learning", "--runs", "/nowhere"], "--runs", "metrics.jsonl"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_measured(argv: list[str], setting: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        run_bench(argv[0], argv[1:])
    assert refused.value.setting == setting
    assert says in str(refused.value)


def test_the_command_ends_with_code_2_for_a_mistake(capsys: Capture) -> None:
    assert main(["bench", "main-job", "--only", "everything"]) == 2
    assert (
        "must be one of engine, flat_groups, learning, parity, push, speculation, whole_step" in capsys.readouterr().err
    )


def test_finished_runs_become_a_table_a_json_and_a_markdown_file(tmp_path: Path, capsys: Capture) -> None:
    runs = [str(write_run(tmp_path / f"run{seed}", seed)) for seed in (7, 8)]
    files = ["--json", str(tmp_path / "rows.json"), "--markdown", str(tmp_path / "rows.md")]
    assert main(["bench", "main-job", "--only", "learning", "--runs", *runs, *files]) == 0
    assert "learning.seed7.rise" in capsys.readouterr().out
    report = json.loads((tmp_path / "rows.json").read_text())
    assert report.keys() == {"rows", "machine", "versions", "seeds", "command", "date"}
    assert report["seeds"] == [0, 1, 2]
    assert report["command"].startswith("slime-spec ")
    assert report["machine"]["cores"] >= 1
    assert report["versions"]["packages"]["torch"]
    rows = {row["id"]: row for row in report["rows"]}
    assert all(row.keys() == {"id", "what", "value", "unit", "reach", "holds"} for row in report["rows"])
    assert rows["learning.seed8.rise"]["value"] == pytest.approx(0.5)
    assert rows["learning.seed8.rise"]["holds"] is True
    assert rows["learning.seed8.rise"]["reach"] == ">= 0.3"
    table = (tmp_path / "rows.md").read_text().splitlines()
    assert "| `learning.seed7.rise` | last over first | 0.5 reward | >= 0.3 | yes |" in table
    assert len([line for line in table if line.startswith("| `")]) == len(rows)


def test_a_row_that_misses_its_reach_is_exit_code_1(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 0, steps(logprob_abs_diff=2e-4))
    assert main(["bench", "main-job", "--only", "learning", "--runs", str(run)]) == 1


def test_a_measured_value_that_is_not_finite_is_written_as_null_and_does_not_hold(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 0, steps(logprob_abs_diff=None))
    files = ["--json", str(tmp_path / "rows.json"), "--markdown", str(tmp_path / "rows.md")]
    assert main(["bench", "main-job", "--only", "learning", "--runs", str(run), *files]) == 1
    rows = {row["id"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert rows["learning.seed0.logprob_abs_diff"]["value"] is None
    assert rows["learning.seed0.logprob_abs_diff"]["holds"] is False
    assert "not finite nats/token" in (tmp_path / "rows.md").read_text()


def test_a_run_that_never_finished_a_step_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 0, rows=[])
    with pytest.raises(ConfigError, match="at least one step"):
        run_bench("main-job", ["--only", "learning", "--runs", str(run)])


def test_every_part_of_the_main_job_is_a_function_that_exists() -> None:
    from slime_spec.interfaces import load_choice

    assert all(callable(load_choice("--only", PARTS, part)) for part in PARTS)
