"""The wheel: what is in it, and that a stranger's environment runs it far from any checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import slime_spec
from slime_spec.metrics.jsonl import read_metrics
from tests.support.tiny_policy import make_tiny_policy

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("slime_spec", "rollout", "trainer_bridge")
STRANGER = "raise RuntimeError('a stranger was imported')\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy: a build leaves folders in its sources, of which a later one would take what is gone."""
    sources = tmp_path_factory.mktemp("sources")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    for name in (*PACKAGES, "conf"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    made = tmp_path_factory.mktemp("dist")
    command = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", made, sources]
    subprocess.run([sys.executable, "-m", "pip", *map(str, command)], check=True)
    (found,) = made.iterdir()
    return found


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the wheel, which borrows the wheel's dependencies from the tests' own."""

    python: Path
    packages: Path

    def run(self, *command: str, folder: Path) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment in ``folder``, with nothing of the checkout on its path."""
        environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        program, *words = command
        return subprocess.run(
            [str(self.python.with_name(program)), *words],
            cwd=folder,
            env={**environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = ["--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run([sys.executable, "-m", "pip", *map(str, install)], check=True)
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip())
    # A folder named so is searched last, and the link to the checkout in it is not followed.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Environment(python, packages)


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_has_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    """Among them conf/, tables in JSON, C sources, the draft that ships, and py.typed."""
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    # What git tracks is what the project consists of; caches lie beside it.
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *PACKAGES, "conf"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    expected = {re.sub("^conf/", "slime_spec/conf/", name) for name in tracked}
    assert packed == expected
    needed = {
        *(f"{package}/py.typed" for package in PACKAGES),
        "slime_spec/conf/experiment/smollm2-135m.yaml",
        "slime_spec/sglang/flags.json",
        "rollout/embedded/kernels/kernels.c",
        "rollout/embedded/kernels/mix.h",
        "slime_spec/checkpoints/builtin/smollm2-135m-eagle3/model.safetensors",
    }
    assert needed <= packed


def test_the_metadata_say_version_pythons_and_extras(wheel: Path) -> None:
    metadata = metadata_of(wheel)
    assert metadata["Version"] == slime_spec.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    pythons = {each for each in metadata.get_all("Classifier", ()) if each.startswith("Programming Language")}
    assert pythons == {f"Programming Language :: Python :: {version}" for version in ("3.11", "3.12")}
    page = (ROOT / "docs" / "install.md").read_text()
    extras = set(metadata.get_all("Provides-Extra", ()))
    assert extras >= {"gpu", "sglang", "dev"}
    assert {extra for extra in extras if f"| `{extra}` |" not in page} == set(), "docs/install.md lists every extra"


def test_an_installed_command_runs_far_from_the_checkout(environment: Environment, tmp_path: Path) -> None:
    told = environment.run("slime-spec", "--help", folder=tmp_path)
    assert told.returncode == 0, told.stderr
    assert "slime-spec train" in told.stdout
    version = environment.run("slime-spec", "--version", folder=tmp_path).stdout
    assert version == f"slime_spec {slime_spec.__version__}\n"
    model, run = make_tiny_policy(tmp_path / "model"), tmp_path / "run"
    argv = ("--config", "tiny", "--hf-checkpoint", str(model), "--output-dir", str(run), "--num-rollout", "1")
    done = environment.run("slime-spec", "train", *argv, "--no-console", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    (step,) = read_metrics(run / "metrics.jsonl")
    assert step["rollout/num_samples"] == 4
    assert (run / "hf" / "config.json").is_file()


def test_an_sglang_beside_it_finds_the_plug_in(environment: Environment, tmp_path: Path) -> None:
    """SGLang's own way of asking; what it gets needs nothing beside the wheel."""
    asked = "from importlib.metadata import entry_points as e; print([p.load() for p in e(group='sglang.srt.plugins')])"
    told = environment.run(
        "python", "-S", "-c", f"import sys; sys.path.append({str(environment.packages)!r}); {asked}", folder=tmp_path
    )
    assert told.returncode == 0, told.stderr
    assert "function activate" in told.stdout


@pytest.mark.parametrize("command", [("slime-spec",), ("python", "-m", "slime_spec")])
def test_a_package_of_the_same_name_in_the_current_folder_is_one_error(
    command: tuple[str, ...], environment: Environment, tmp_path: Path
) -> None:
    """Ray's processes look into that folder first, also where the command itself does not."""
    (tmp_path / "rollout").mkdir()
    (tmp_path / "rollout" / "__init__.py").write_text(STRANGER)
    done = environment.run(*command, "config", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: package rollout\n")
    assert f"must be slime_spec's own, {environment.packages / 'rollout'};" in done.stderr
    assert f"value:  '{tmp_path / 'rollout'}'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_package_of_the_same_name_that_was_installed_over_ours_is_one_error(
    environment: Environment, tmp_path: Path
) -> None:
    ours, info = environment.packages / "rollout" / "__init__.py", environment.packages / "other_rollout-1.0.dist-info"
    text = ours.read_text()
    ours.write_text(STRANGER)
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-rollout\nVersion: 1.0\n")
    (info / "RECORD").write_text("rollout/__init__.py,,\n")
    try:
        done = environment.run("slime-spec", "config", folder=tmp_path)
    finally:
        ours.write_text(text)
        shutil.rmtree(info)
    assert done.returncode == 2
    assert done.stderr.startswith("error: package rollout\n")
    assert str(ours) in done.stderr
    assert "value:  'other-rollout'" in done.stderr
    assert "pip uninstall other-rollout" in done.stderr
