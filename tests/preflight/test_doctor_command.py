"""``slime-spec doctor``: a table, JSON or flags, and an exit code by the gravest finding."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from rollout.sglang_engine.external import check_flags
from rollout.sglang_engine.fake import FakeServer, serving
from slime_spec.config.build import to_yaml
from slime_spec.errors import ConfigError
from slime_spec.launch.cli import main
from slime_spec.launch.compose import compose, composed
from slime_spec.launch.preflight import look
from slime_spec.preflight.checks import TRAPS
from slime_spec.preflight.finished_run import acceptance_by_position
from slime_spec.sglang.flags import sglang_version
from tests.support.doctor_facts import CHAIN, SERVERS, python_with
from tests.support.tiny_policy import make_tiny_policy

Capture = pytest.CaptureFixture[str]
HEAD = {"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "draft_vocab_size": 200}
ELSEWHERE = ("--ray-address", "auto")


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    """A sound EAGLE-3 job on someone else's cluster."""
    like_llama = {"torch_dtype": "bfloat16", "max_position_embeddings": 8192, "num_hidden_layers": 8}
    sizes = make_tiny_policy(tmp_path / "target", **like_llama) / "config.json"
    (tmp_path / "draft").mkdir()
    head = {**json.loads(sizes.read_text()), **HEAD}
    (tmp_path / "draft" / "config.json").write_text(json.dumps(head))
    paths = ["--hf-checkpoint", str(tmp_path / "target"), "--speculative-draft-model-path", str(tmp_path / "draft")]
    servers = [*SERVERS, "--sglang-python", str(python_with(tmp_path, sglang=sglang_version()))]
    return [*servers, *ELSEWHERE, "--speculative-algorithm", "EAGLE3", *CHAIN, *paths]


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


def test_the_doctor_tells_a_mistyped_flag_without_torch(job: list[str]) -> None:
    """Which takes longer to import than everything that the doctor does for it."""
    words = ["doctor", *job, "--lrr", "1"]
    asked = f"import sys; from slime_spec.launch.cli import main; main({words!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


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


def test_a_run_that_accepted_nothing_is_judged_and_not_passed_over(
    job: list[str], tmp_path: Path, capsys: Capture
) -> None:
    run = write_metrics(tmp_path / "run", {"spec/verify_rounds": 22, "spec/accept_rate_cum_pos_0": 0.0})
    assert acceptance_by_position(run) == (0.0,)
    assert main(["doctor", "--json", "--metrics", str(run), *job]) == 1
    (found,) = (each for each in json.loads(capsys.readouterr().out)["findings"] if each["id"] == "acceptance-bar")
    assert found["read"].startswith("accepted by draft position in the finished run: 0%;")


def test_without_flags_a_finished_run_is_checked_as_it_ran(job: list[str], tmp_path: Path, capsys: Capture) -> None:
    """So that what is judged is the draft's depth of that run, not the defaults'."""
    run = write_metrics(tmp_path / "run", {"spec/verify_rounds": 10, "spec/accept_rate_cum_pos_0": 0.5})
    (run / "config.yaml").write_text(to_yaml(compose([*job, "--rollout-min-p", "0.1"])))
    assert main(["doctor", "--json", "--metrics", str(run)]) == 2
    found = [each["id"] for each in json.loads(capsys.readouterr().out)["findings"]]
    assert found[0] == "min-p"
    assert "acceptance-bar" in found


def test_a_check_that_is_skipped_is_shown_and_does_not_count(job: list[str], capsys: Capture) -> None:
    assert main(["doctor", *job, "--rollout-min-p", "0.1", "--skip-check", "min-p"]) == 0
    assert "error min-p (skipped)" in capsys.readouterr().out


def test_what_is_set_for_one_engine_or_added_to_its_command_line_is_checked_too(
    job: list[str], tmp_path: Path, capsys: Capture
) -> None:
    own = tmp_path / "engines.yaml"
    own.write_text("1: {attention_backend: torch_native}\n")
    two = [*job, "--rollout-num-engines", "2", "--no-colocate"]
    assert main(["doctor", "--json", *two, "--sglang-config", str(own)]) == 2
    (found,) = (each for each in json.loads(capsys.readouterr().out)["findings"] if each["id"] == "verify-backend")
    assert found["read"] == "engine 1: attention backend torch_native with speculation"
    assert found["fix"] == []
    assert "--sglang-config" in found["remedy"]
    assert main(["doctor", "--json", *two, "--sglang-extra-args=--disable-cuda-graph-padding"]) == 1
    assert "graph-padding-switch" in capsys.readouterr().out


def test_a_server_that_someone_else_started_is_judged_by_what_it_tells(job: list[str], capsys: Capture) -> None:
    server = FakeServer()
    server.server_args = {"version": "0.5.6", "attention_backend": "flashinfer", "max_running_requests": 48}
    with serving(server) as address:
        assert main(["doctor", "--json", *job, "--rollout-external-engine-addrs", address]) == 2
        told = json.loads(capsys.readouterr().out)
        found = {each["id"]: each for each in told["findings"]}
        # fa3 is what the flags here say; the server runs with flashinfer, and with another version.
        assert told["sglang"] == "0.5.6"
        assert found["mask-padding"]["read"].startswith(f"{address}: SGLang 0.5.6 verifies drafts")
        assert f"Where {address} is started" in found["mask-padding"]["remedy"]
        assert found["mask-padding"]["fix"] == []
        server.server_args = {"version": "0.5.21", "attention_backend": "fa3", "mem_fraction_static": 0.8}
        assert main(["doctor", *job, "--rollout-external-engine-addrs", address]) == 0


@pytest.mark.parametrize(("dest", "value"), [("dtype", "float16"), ("speculative_algorithm", None)])
def test_an_external_server_that_is_not_the_runs_is_refused_by_each_command_as_by_the_start(
    dest: str, value: str | None, job: list[str], capsys: Capture
) -> None:
    """Case sglang/04-external."""
    server = FakeServer()
    server.server_args = {"version": sglang_version(), "attention_backend": "fa3", dest: value}
    with serving(server) as address:
        words = [*job, "--rollout-external-engine-addrs", address]
        with pytest.raises(ConfigError) as refused:
            check_flags(f"http://{address}", compose(words), 0, server.server_args)
        assert main(["doctor", "--json", *words]) == 2
        errors = [each for each in json.loads(capsys.readouterr().out)["findings"] if each["severity"] == "error"]
        assert main(["train", *words, "--dry-run"]) == 2
        dry_run = capsys.readouterr().out
        assert main(["train", *words]) == 2
        launch = capsys.readouterr().err
    assert refused.value.rule in errors[0]["read"]
    assert f"was started with --{dest.replace('_', '-')} {value or 'NONE'}" in errors[0]["read"]
    assert refused.value.remedy == errors[0]["remedy"]
    assert " ".join(refused.value.rule.split()) in " ".join(dry_run.split())
    assert refused.value.rule in launch


def test_a_flag_of_an_external_server_that_bends_nothing_is_a_warning(job: list[str], capsys: Capture) -> None:
    server = FakeServer()
    server.server_args = {"version": sglang_version(), "attention_backend": "triton"}
    with serving(server) as address:
        assert main(["doctor", "--json", *job, "--rollout-external-engine-addrs", address]) == 1
    found = {each["id"]: each for each in json.loads(capsys.readouterr().out)["findings"]}["external-flags"]
    assert found["read"] == f"external server http://{address} has --attention-backend triton, not fa3"


def test_of_servers_that_do_not_answer_only_what_is_asked_of_them_is_judged(job: list[str], capsys: Capture) -> None:
    silent = ["--rollout-external-engine-addrs", "127.0.0.1:9", "--sglang-attention-backend", "torch_native"]
    assert main(["doctor", "--json", *job, *silent, "--rollout-min-p", "0.1"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert [each["id"] for each in told["findings"]] == ["min-p", "external-servers", "end-of-text"]
    assert told["fix"] == ["--rollout-min-p", "0"]


@pytest.mark.parametrize("text", [None, "not json\n", '{"no": "step"}\n'])
def test_a_metrics_file_that_is_none_is_refused_by_name(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl"):
        acceptance_by_position(tmp_path)


def test_an_error_stops_a_launch_before_anything_starts(job: list[str], capsys: Capture) -> None:
    assert main(["train", *job, "--rollout-min-p", "0.1"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: preflight\n  rule:\n    min-p: min_p 0.1 with speculation\n")
    assert "\n    min-p: Pass --rollout-min-p 0" in told
    assert "--skip-check min-p" in told


def test_a_skipped_error_and_a_warning_are_logged_once_each(job: list[str], caplog: pytest.LogCaptureFixture) -> None:
    argv = [*job, "--rollout-min-p", "0.1", "--sglang-disable-cuda-graph-padding", "--skip-check", "min-p"]
    made = composed(argv)
    with caplog.at_level(logging.INFO):
        look(made).checked()
    assert sorted(record.getMessage().split(":")[0] for record in caplog.records) == [
        "preflight found check=graph-padding-switch",
        "preflight found check=min-p",
    ]


def test_a_check_to_skip_that_does_not_exist_is_refused_with_the_nearest(job: list[str]) -> None:
    argv = [*job, "--skip-check", "min-q"]
    made = composed(argv)
    with pytest.raises(ConfigError, match="Did you mean min-p"):
        look(made).checked()
