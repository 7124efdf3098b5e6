"""Install the peers, each into its own virtual environment, as their pins conflict with this project's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from slime_spec.bench.peers.catalogue import STAMP, Peer
from slime_spec.bench.rows import BenchOptions
from slime_spec.errors import ConfigError

Run = Callable[[Sequence[str], Mapping[str, str], Path], int]
QUIET = ("--quiet", "--disable-pip-version-check", "--no-input")


def run_logged(command: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
    """Run a command with its output in ``log``; return its exit code."""
    with log.open("a") as output:
        return subprocess.run(command, env=environment, stdout=output, stderr=output).returncode


def install(peer: Peer, folder: Path, run: Run = run_logged) -> None:
    """Install ``folder/<peer>`` by the peer's recipe unless it is there; takes minutes, as one peer is compiled.

    Raises ConfigError with the log's path when a step fails; the stamp is written last, so that an incomplete
    installation is never used.
    """
    console = Console(stderr=True)
    if peer.is_installed(folder):
        console.print(f"{peer.title} is already in {folder / peer.name}")
        return
    home = folder / peer.name
    log = folder / f"{peer.name}-install.log"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(home, ignore_errors=True)
    log.unlink(missing_ok=True)
    pip = [str(peer.python(folder)), "-m", "pip"]
    commands = [[sys.executable, "-m", "venv", str(home)]]
    commands += [[*pip, verb, *QUIET, *arguments] for verb, *arguments in peer.recipe]
    for command in commands:
        step = " ".join(command[2:])
        with console.status(f"{peer.title}: {step} (log: {log})"):
            code = run(command, {**os.environ, **peer.build_environment}, log)
        if code != 0:
            raise ConfigError("--install-peers", f"a step of {peer.title} ended with code {code}", step, f"Read {log}.")
    (home / STAMP).write_text(json.dumps(peer.stamp))
    console.print(f"installed {peer.title} in {home}")


def add_peer_flags(parser: ArgumentParser) -> None:
    """Add the flags of a benchmark that runs peers."""
    parser.add_argument("--peers", metavar="DIR", type=Path, help=f"where the peers are ({BenchOptions.peers})")
    parser.add_argument(
        "--install-peers", action="store_true", help="first install those that are not there (minutes, gigabytes)"
    )
