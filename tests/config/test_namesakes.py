"""A package of the user's that has the name of ours is refused before anything is imported of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_with(folder: Path, command: str = "config") -> subprocess.CompletedProcess[str]:
    """The command line of this checkout, with ``folder`` before it on Python's path."""
    return subprocess.run(
        [sys.executable, "-m", "slime_spec", command],
        cwd=folder.parent,
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("command", ["config", "models", "no-such-command"])
@pytest.mark.parametrize("name", ["rollout.py", "trainer_bridge/__init__.py"])
def test_a_module_or_package_that_comes_first_is_refused_with_both_paths(
    name: str, command: str, tmp_path: Path
) -> None:
    folder = tmp_path / "path"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("raise RuntimeError('imported')")
    done = run_with(folder, command)
    package = name.partition("/")[0].removesuffix(".py")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: package {package}\n")
    assert f"must be slime_spec's own, {ROOT / package};" in done.stderr
    assert f"value:  '{folder / name.partition('/')[0]}'" in done.stderr


def test_a_folder_that_is_no_package_does_no_harm(tmp_path: Path) -> None:
    folder = tmp_path / "path"
    (folder / "rollout").mkdir(parents=True)
    (folder / "rollout" / "notes.txt").touch()
    assert run_with(folder).returncode == 0
