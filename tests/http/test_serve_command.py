"""``slime-spec serve``: one line when it answers, a clean end, and mistakes found before a model is loaded."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from slime_spec.errors import ConfigError
from slime_spec.launch.cli import main
from slime_spec.launch.serve import read_serve_arguments

Capture = pytest.CaptureFixture[str]


def test_the_command_serves_until_it_is_told_to_end(policy: Path) -> None:
    argv = ["serve", "--hf-checkpoint", str(policy), "--port", "0", "--sp-type", "deterministic"]
    argv += ["--sglang-context-length", "64", "--rollout-num-cpus-per-engine", "1", "--sglang-enable-metrics"]
    process = subprocess.Popen(
        [sys.executable, "-m", "slime_spec", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving http://127.0.0.1:")
        assert "speculation=LOOKUP" in line
        url = line.split()[1]
        body = json.dumps({"text": "abc", "sampling_params": {"max_new_tokens": 5, "ignore_eos": True}}).encode()
        request = urllib.request.Request(f"{url}/generate", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert len(json.load(answer)["output_ids"]) == 5
        with urllib.request.urlopen(f"{url}/server_info", timeout=60) as answer:
            info = json.load(answer)
        assert (info["context_length"], info["speculative_algorithm"]) == (64, "LOOKUP")
    finally:
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert "note: The embedded engine has no use for --sglang-enable-metrics." in err
    assert f"loading address={url} model={policy}" in err
    assert len(re.findall(r"request method=POST path=/generate status=200 seconds=[\d.]+ client=127.0.0.1\n", err)) == 1


def test_a_port_in_use_is_found_before_the_model_is_loaded(policy: Path, capsys: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--hf-checkpoint", str(policy), "--port", str(taken.getsockname()[1])]) == 2
    assert "--host and --port" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "setting"),
    [
        (["--lr", "1e-6"], "trainer.lr"),
        (["--rollout-temperature", "0.5"], "rollout.temperature"),
        (["--debug-train-only"], "run.mode"),
        (["--port", "http"], "--port"),
        (["--port", "70000"], "--port"),
        (["--max-request-mb", "0"], "--max-request-mb"),
        (["--max-queued-requests", ""], "--max-queued-requests"),
        (["--client-timeout-s", "0"], "--client-timeout-s"),
        (["--hf-checkpoint", "/nowhere"], "model.hf_checkpoint"),
        (["--hots", "0.0.0.0"], "--hots"),
    ],
)
def test_mistakes_are_one_block_on_stderr(capsys: Capture, argv: list[str], setting: str) -> None:
    assert main(["serve", *argv]) == 2
    assert capsys.readouterr().err.startswith(f"error: {setting}\n")


def test_flags_of_engine_and_speculation_are_those_of_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIME_SPEC_API_KEY", "from-the-environment")
    argv = ["--sp-type", "deterministic", "--seed", "3", "engine.dtype=bfloat16", "--incremental-streaming-output"]
    arguments = read_serve_arguments([*argv, "--sglang-max-running-requests", "4", "--host", "::1"])
    assert (arguments.config.speculative.algorithm, arguments.config.engine.dtype) == ("LOOKUP", "bfloat16")
    assert (arguments.config.run.seed, arguments.config.engine.max_running_requests) == (3, 4)
    assert (arguments.host, arguments.port, arguments.incremental_streaming) == ("::1", 30000, True)
    assert arguments.api_key == "from-the-environment"


def test_the_key_comes_from_a_file_that_its_owner_alone_reads_and_from_no_command_line(tmp_path: Path) -> None:
    """Case sglang/11: whoever lists processes reads their arguments."""
    file = tmp_path / "key"
    file.write_text("own\n")
    file.chmod(0o600)
    assert read_serve_arguments(["--api-key-file", str(file)]).api_key == "own"
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="readable by its owner alone; its mode is 0640"):
        read_serve_arguments(["--api-key-file", str(file)])
    with pytest.raises(ConfigError, match="must not be on a command line") as refused:
        read_serve_arguments(["--api-key", "very-secret"])
    assert "very-secret" not in str(refused.value)


def test_the_help_says_how_to_reach_it(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])
    assert ended.value.code == 0
    assert "--api-key-file" in capsys.readouterr().out
