"""Every launch script composes, passes its trailing arguments through, and starts nothing of another's."""

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.launched import environment_of, run_in_process

ROOT = Path(__file__).resolve().parents[2]
WHO = "#!/bin/sh\necho $$\n"  # a Python that says which process it is
LAUNCHERS = sorted((ROOT / "scripts").glob("run-*.sh"))


def resolved(script: Path, model: Path, *arguments: str) -> dict:
    """The configuration that a script's flags describe, without running anything."""
    environ = {"SLIME_SPEC_COMMAND": "config", "MODEL_DIR": str(model)}
    done = run_in_process(script.name, *arguments, environ=environ)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_there_are_launch_scripts():
    assert any(script.name == "run-smollm2-135M.sh" for script in LAUNCHERS)


@pytest.mark.parametrize("script", LAUNCHERS, ids=lambda script: script.name)
def test_a_scripts_flags_compose_and_trailing_arguments_win(script, model):
    config = resolved(script, model, "--num-rollout", "3", "trainer.lr=5e-6", "--rollout-batch-size=5")
    assert config["model"]["hf_checkpoint"] == str(model)
    assert config["run"]["num_rollout"] == 3
    assert config["trainer"]["lr"] == 5e-6
    assert config["rollout"]["batch_size"] == 5


@pytest.mark.parametrize("script", LAUNCHERS, ids=lambda script: script.name)
def test_a_signal_to_a_script_reaches_the_run_that_it_launched(script, model):
    """Case reports/06: the shell's process becomes the run's, so that a preempted job ends in order."""
    environ = {"MODEL_DIR": str(model), "DRAFT_DIR": str(model), "SLIME_SPEC_VENV": str(environment_of(WHO))}
    with subprocess.Popen(["bash", str(script)], stdout=subprocess.PIPE, env={**os.environ, **environ}) as process:
        assert process.stdout is not None
        assert int(process.stdout.read()) == process.pid


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda script: script.name)
def test_no_script_kills_by_name_or_forgets_to_stop_at_an_error(script):
    text = script.read_text()
    assert not re.search(r"\b(pkill|killall)\b|\bray stop\b", text)
    assert script.name == "lib.sh" or "set -euo pipefail" in text


def ensure(checkout: Path, venv: Path) -> subprocess.CompletedProcess[str]:
    """What ``ensure_venv`` of a checkout says of an environment; python3 is missing, so that nothing is installed."""
    (checkout / "scripts").mkdir(parents=True, exist_ok=True)
    for name in ("scripts/lib.sh", "constraints.txt", "setup.py"):
        (checkout / name).write_bytes((ROOT / name).read_bytes())
    return subprocess.run(
        ["bash", "-c", 'set -e; source scripts/lib.sh; python3() { echo "would install" >&2; exit 9; }; ensure_venv'],
        cwd=checkout,
        env={**os.environ, "SLIME_SPEC_VENV": str(venv), "PYTHON": "absent-python"},
        capture_output=True,
        text=True,
    )


def test_two_checkouts_do_not_share_an_environment(tmp_path):
    """The second would re-install over the first, whose commands would then run the second's code."""
    venv, first, second = tmp_path / "venv", tmp_path / "first", tmp_path / "second"
    venv.mkdir()
    assert ensure(first, venv).returncode == 9, "an environment without a stamp is set up"
    wanted = hashlib.sha256((ROOT / "constraints.txt").read_bytes() + (ROOT / "setup.py").read_bytes()).hexdigest()
    (venv / ".slime_spec_stamp").write_text(f"{wanted} {first}\n")
    assert ensure(first, venv).returncode == 0
    refused = ensure(second, venv)
    assert refused.returncode == 2
    assert f"this one runs the checkout {first}" in refused.stderr
    assert f"(the environment is {second}/.venv then)" in refused.stderr
    (venv / ".slime_spec_stamp").write_text(f"older {first}\n")
    assert ensure(first, venv).returncode == 9, "its own checkout brings it up to date"
    shutil.rmtree(first)
    assert ensure(second, venv).returncode == 9, "an environment whose checkout is gone is taken over"


def test_ci_takes_its_environment_back_from_a_checkout_that_used_it_meanwhile(tmp_path):
    """CI's clone comes and goes; the environment that is named after it must not stay another checkout's."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".ci").mkdir()
    for name in (".ci/run", "constraints.txt", "setup.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "scripts/install-sglang-cpu.sh").touch()
    (tmp_path / "scripts/check.sh").write_text(
        'stamp="$SLIME_SPEC_VENV/.slime_spec_stamp"; ls "$stamp" || echo "$stamp"\n'
    )
    for name in ("test.sh", "check-python312.sh"):
        (tmp_path / "scripts" / name).touch()
    environ = {key: value for key, value in os.environ.items() if key != "SLIME_SPEC_VENV"}
    environ["XDG_CACHE_HOME"] = str(tmp_path)

    def stamp_seen_by_ci() -> Path:
        done = subprocess.run(
            ["bash", ".ci/run"], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True
        )
        return Path(done.stdout.strip())

    stamp = stamp_seen_by_ci()
    stamp.parent.mkdir(parents=True)
    stamp.write_text(f"wanted {tmp_path}\n")
    assert stamp_seen_by_ci() == stamp
    assert stamp.exists(), "its own is used as it is"
    stamp.write_text(f"wanted {ROOT}\n")
    assert stamp_seen_by_ci() == stamp
    assert not stamp.exists(), "another's is set up anew"


def test_triton_is_the_release_that_the_pinned_torch_asks_for():
    """Torch for CUDA needs this release of triton and no other: with another pin pip could not install both."""
    pins = dict(re.findall(r"(?m)^(torch|triton)==(\S+)$", (ROOT / "constraints.txt").read_text()))
    assert pins == {"torch": "2.13.0", "triton": "3.7.1"}
