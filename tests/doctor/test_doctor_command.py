"""``slime-spec doctor``: a table, JSON or flags, and an exit code by the gravest finding."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from slime_spec.errors import ConfigError
from slime_spec.launch.cli import main
from slime_spec.launch.compose import compose
from slime_spec.launch.doctor.checks import TRAPS
from slime_spec.launch.doctor.finished_run import acceptance_by_position
from slime_spec.launch.doctor.preflight import check_launch
from tests.support.doctor_facts import CHAIN, EAGLE3_HEAD, SERVERS, TARGET

Capture = pytest.CaptureFixture[str]
EXTERNAL = ("--rollout-external-engine-addrs", "10.0.0.1:30000")


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    """A sound EAGLE-3 job on servers that someone else started (no SGLang is needed here)."""
    for name, config in (("target", TARGET), ("draft", EAGLE3_HEAD)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    paths = ["--hf-checkpoint", str(tmp_path / "target"), "--speculative-draft-model-path", str(tmp_path / "draft")]
    return [*SERVERS, *EXTERNAL, "--speculative-algorithm", "EAGLE3", *CHAIN, *paths]


def write_metrics(folder: Path, *steps: dict[str, float]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": i, **step}) + "\n" for i, step in enumerate(steps))
    )
    return folder


@pytest.mark.parametrize(
    ("added", "code"),
    [
        ((), 0),
        (("--sglang-disable-cuda-graph-padding",), 1),
        (("--rollout-min-p", "0.1"), 2),
        (("--rollout-min-p", "0.1", "--sglang-disable-cuda-graph-padding"), 2),
    ],
    ids=["information", "warning", "error", "both"],
)
def test_the_exit_code_is_that_of_the_gravest_finding(added, code: int, job: list[str], capsys: Capture) -> None:
    assert main(["doctor", *job, *added]) == code
    assert f"{len(TRAPS)} checks" in capsys.readouterr().out


def test_json_carries_every_finding_whole(job: list[str], capsys: Capture) -> None:
    assert main(["doctor", "--json", *job, "--rollout-min-p", "0.1"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert (told["error"], told["num_checks"]) == (1, len(TRAPS))
    found = told["findings"][0]
    assert found["id"] == "min-p"
    assert found["fix"] == told["fix"] == ["--rollout-min-p", "0"]
    assert set(found) == {"id", "severity", "read", "why", "remedy", "fix", "links"}


def test_what_fix_prints_makes_the_same_command_sound(job: list[str], capsys: Capture) -> None:
    broken = [*job, "--rollout-min-p", "0.1", "--sglang-attention-backend", "flashinfer"]
    assert main(["doctor", "--fix", *broken]) == 2
    flags = capsys.readouterr().out.split()
    assert flags == ["--rollout-min-p", "0", "--sglang-attention-backend", "fa3"]
    assert main(["doctor", *broken, *flags]) == 0


def test_a_configuration_that_is_refused_is_a_finding_too(capsys: Capture) -> None:
    assert main(["doctor", "--json", "--speculative-algorithm", "EAGLE3"]) == 2
    (found,) = json.loads(capsys.readouterr().out)["findings"]
    assert found["id"] == "configuration"
    assert "speculative.draft_model_path" in found["read"]


def test_a_finished_run_is_judged_by_draft_position(job: list[str], tmp_path: Path, capsys: Capture) -> None:
    run = write_metrics(tmp_path / "run", {"spec/verify_rounds": 10, "spec/accept_rate_cum_pos_0": 0.5})
    assert main(["doctor", "--json", "--metrics", str(run), *job]) == 1
    (found,) = (each for each in json.loads(capsys.readouterr().out)["findings"] if each["id"] == "acceptance-bar")
    assert "50%" in found["read"]


def test_acceptance_pools_steps_by_their_rounds_and_counts_an_absent_position_as_none(tmp_path: Path) -> None:
    run = write_metrics(
        tmp_path / "run",
        {"spec/verify_rounds": 30, "spec/accept_rate_cum_pos_0": 0.8, "spec/accept_rate_cum_pos_1": 0.4},
        {"spec/verify_rounds": 10, "spec/accept_rate_cum_pos_0": 0.4},
        {"rollout/num_samples": 3},
    )
    assert acceptance_by_position(run) == pytest.approx((0.7, 0.3))
    assert acceptance_by_position(run / "metrics.jsonl") == pytest.approx((0.7, 0.3))


@pytest.mark.parametrize("text", [None, "not json\n", '{"no": "step"}\n'])
def test_a_metrics_file_that_is_none_is_refused_by_name(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl"):
        acceptance_by_position(tmp_path)


def test_an_error_stops_a_launch_before_anything_starts(job: list[str], capsys: Capture) -> None:
    assert main(["train", *job, "--rollout-min-p", "0.1"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: preflight\n")
    assert "min-p: Pass --rollout-min-p 0" in told
    assert "--skip-check min-p" in told


def test_a_skipped_error_and_a_warning_are_logged_once_each(job: list[str], caplog: pytest.LogCaptureFixture) -> None:
    argv = [*job, "--rollout-min-p", "0.1", "--sglang-disable-cuda-graph-padding", "--skip-check", "min-p"]
    with caplog.at_level(logging.INFO):
        check_launch(compose(argv), argv)
    assert sorted(record.getMessage().split(":")[0] for record in caplog.records) == [
        "preflight found check=graph-padding-switch",
        "preflight found check=min-p",
    ]


def test_a_check_to_skip_that_does_not_exist_is_refused_with_the_nearest(job: list[str]) -> None:
    argv = [*job, "--skip-check", "min-q"]
    with pytest.raises(ConfigError, match="Did you mean min-p"):
        check_launch(compose(argv), argv)
