"""The machine's C compiler builds the kernels' shared library at first use; a cache keeps the library."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
import tempfile
from hashlib import sha256
from pathlib import Path

SOURCES = Path(__file__).parent
MAIN = SOURCES / "kernels.c"
FLAGS = (
    "-O3",
    "-std=gnu11",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
)
NATIVE = ("-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native",)
COMPILE_TIMEOUT_S = 300.0


class BuildError(Exception):
    """Says that there is no library: no compiler was found, or it failed."""


def build_library(machine_flags: tuple[str, ...] = NATIVE, cache: Path | None = None) -> Path:
    """Return the path of the compiled library; raises BuildError.

    The file's name is a hash of sources, compiler, flags and processor, so that a cache shared by machines, or an
    upgraded compiler, never yields code for something else. Of processes that want it at once, one compiles.
    """
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        raise BuildError("no C compiler (cc) on PATH")
    sources = sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h")])
    identity = "\n".join([_run([compiler, "--version"]), *machine_flags, *FLAGS, _processor()])
    digest = sha256(b"".join([identity.encode(), *(path.read_bytes() for path in sources)])).hexdigest()[:20]
    folder = cache if cache is not None else default_cache()
    library = folder / f"kernels-{digest}.so"
    if not library.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not library.exists():
                    _compile(compiler, machine_flags, library)
        except OSError as error:
            raise BuildError(f"cannot write to {folder}: {error}") from error
    return library


def default_cache() -> Path:
    """Return the user's cache folder, or a temporary one of the user's where that cannot be written.

    Raises BuildError.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slime_spec"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError:
        root = Path(tempfile.gettempdir()) / f"slime_spec-{os.getuid()}"
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.stat().st_uid != os.getuid():  # what lies in it is loaded as code
        raise BuildError(f"{root} belongs to another user")
    return root


def _compile(compiler: str, machine_flags: tuple[str, ...], library: Path) -> None:
    handle, unfinished = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    try:
        _run([compiler, *FLAGS, *machine_flags, str(MAIN), "-o", unfinished, "-lm"])
        os.replace(unfinished, library)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=True)
    except subprocess.CalledProcessError as error:
        message = " ".join(error.stderr.split())[:300]
        raise BuildError(f"{command[0]} failed: {message}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    return done.stdout


def _processor() -> str:
    """Return the processor's description, which decides the instructions that -march=native means."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform()
    kept = [line for line in lines if line.startswith(("model", "flags", "Features", "CPU part"))]
    return "\n".join(sorted(set(kept)))
