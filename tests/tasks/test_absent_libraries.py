"""What a machine without the optional libraries says: the extra that brings each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import slime_spec

CASES = {
    "math_verify": ("from slime_spec.tasks.rewards import load_named; load_named('task.reward', 'math')", "math"),
    "reasoning_gym": (
        "from slime_spec.tasks.named_tasks import load_task; load_task('reasoning_gym:leg_counting')",
        "reasoning-gym",
    ),
    "datasets": (
        "from slime_spec.tasks.data_file import data_rows; list(data_rows('task.prompt_data', 'saved'))",
        "datasets",
    ),
    "pyarrow": (
        "from slime_spec.tasks.data_file import data_rows; list(data_rows('task.prompt_data', 'a.parquet'))",
        "datasets",
    ),
}


@pytest.mark.parametrize("library", CASES)
def test_an_absent_library_is_an_error_that_names_its_extra(library: str, tmp_path: Path) -> None:
    """A module of the library's name that cannot be imported stands before it on the path of a fresh interpreter."""
    code, extra = CASES[library]
    (tmp_path / f"{library}.py").write_text("raise ImportError('it is not here')\n")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    path = os.pathsep.join([str(tmp_path), str(Path(slime_spec.__file__).parent.parent)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert "ConfigError: task." in done.stderr
    assert f"pip install 'slime_spec[{extra}]'" in done.stderr
