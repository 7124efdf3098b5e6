"""A launch script's own command line, run in this process: the shell does its part, and no interpreter starts anew."""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from slime_spec.launch.cli import main

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
# Stands for the environment's Python: it prints its arguments, NUL after each.
ECHO = '#!/bin/sh\nprintf "%s\\\\0" "$@"\n'


@dataclass(frozen=True)
class Ended:
    """How a command ended, as subprocess tells it."""

    returncode: int
    stdout: str
    stderr: str


@cache
def environment_of(python: str) -> Path:
    """A folder that scripts take for a complete environment, with ``python`` (a shell script) as its Python."""
    folder = Path(mkdtemp(prefix="slime_spec-echo-"))
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(python)
    (folder / "bin" / "python").chmod(0o755)
    stamp = subprocess.run(
        ["bash", "-c", f'source "{SCRIPTS}/lib.sh"; echo "$(_wanted_stamp) $ROOT"'],
        capture_output=True,
        text=True,
        check=True,
    )
    (folder / ".slime_spec_stamp").write_text(stamp.stdout)
    return folder


def words_of(script: str, *arguments: str, environ: Mapping[str, str] | None = None) -> list[str]:
    """What the script has its Python run: ``["-m", "slime_spec", "train", "--config", ...]``."""
    done = subprocess.run(
        ["bash", str(SCRIPTS / script), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **(environ or {}), "SLIME_SPEC_VENV": str(environment_of(ECHO))},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


def run_in_process(script: str, *arguments: str, environ: Mapping[str, str] | None = None) -> Ended:
    """Run the script's command here; for those that start nothing (config, --dry-run, a refused launch)."""
    module, name, *words = words_of(script, *arguments, environ=environ)
    assert (module, name) == ("-m", "slime_spec"), "scripts run the command line"
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(words)
    return Ended(code, out.getvalue(), err.getvalue())
