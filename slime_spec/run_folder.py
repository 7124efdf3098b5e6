"""A run's folder holds its configuration, its versions and its outputs; nothing in the folder is deleted."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.metrics.jsonl import FILE as METRICS

# The files that a run that starts anew in the same folder would append to.
LOGS = (METRICS, "samples.jsonl")
SOURCE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class RunFolder:
    """Names the files of a run::

    config.yaml       the resolved configuration; reloading it gives the same configuration
    versions.json     packages, Python, platform, git revision
    command.txt       the command line
    metrics.jsonl     one line per step
    samples.jsonl     one line per sample, with --save-samples
    checkpoints/      the trainer's
    hf/               the policy at the end, as a Hugging Face checkpoint
    """

    path: Path

    @classmethod
    def create(cls, config: Config, argv: Sequence[str], config_yaml: str) -> RunFolder:
        """Make ``runs/<name>`` or ``run.output_dir``, or go on in it.

        A folder of a run with another configuration is refused unless this run resumes (``trainer.load``). A run that
        starts anew with the same configuration sets the earlier logs aside (``metrics.1.jsonl``); one that resumes
        appends to them.
        """
        path = (Path(config.run.output_dir) if config.run.output_dir else Path("runs") / config.run.name).absolute()
        resuming = config.trainer.load is not None
        _refuse_strangers(path, config_yaml, resuming)
        setting = "run.output_dir" if config.run.output_dir else "run.name"
        try:
            path.mkdir(parents=True, exist_ok=True)
            for name in () if resuming else LOGS:
                _set_aside(path / name)
            _write(path / "config.yaml", config_yaml)
            _write(path / "command.txt", shlex.join(argv) + "\n")
            _write(path / "versions.json", json.dumps(versions(), indent=2) + "\n")
        except OSError as error:
            raise ConfigError(
                setting, f"must be a folder that can be written: {error.strerror}", str(path), "Pass --output-dir DIR."
            ) from None
        return cls(path)

    @property
    def config_yaml(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def hf_export(self) -> Path:
        return self.path / "hf"


def versions() -> dict[str, object]:
    """Return the versions that the run uses; ``git`` is null outside a checkout of this project."""
    packages = {name: found.version for found in distributions() if (name := found.metadata["Name"])}
    return {
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git": git_state(SOURCE),
    }


def git_state(source: Path) -> dict[str, object] | None:
    """Return ``{"revision": "4f0c...", "dirty": False}`` of the checkout whose root is ``source``, or None."""
    root = _git(source, "rev-parse", "--show-toplevel")
    revision = _git(source, "rev-parse", "HEAD")
    if root is None or revision is None or Path(root) != source:
        return None
    return {"revision": revision, "dirty": bool(_git(source, "status", "--porcelain"))}


def _git(source: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(source), *command], capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _refuse_strangers(path: Path, config_yaml: str, resuming: bool) -> None:
    remedy = "Pass another --run-name or --output-dir, or resume with --load CHECKPOINTS."
    if path.is_file():
        raise ConfigError("run.output_dir", "must be a folder, or absent", str(path), remedy)
    if resuming or not path.is_dir() or not any(path.iterdir()):
        return
    earlier = path / "config.yaml"
    if not earlier.is_file():
        raise ConfigError("run.output_dir", "must be empty, or hold a run (a config.yaml)", str(path), remedy)
    if earlier.read_text(encoding="utf-8") != config_yaml:
        raise ConfigError("run.name", "its folder holds a run with another configuration", str(path), remedy)


def _write(path: Path, text: str) -> None:
    """Write the file; an existing file with another text is set aside first."""
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        _set_aside(path)
    path.write_text(text, encoding="utf-8")


def _set_aside(path: Path) -> None:
    """Rename ``metrics.jsonl``, if it is there, to the first free of ``metrics.1.jsonl``, ``metrics.2.jsonl``, ..."""
    if path.exists():
        number = 1
        while (free := path.with_suffix(f".{number}{path.suffix}")).exists():
            number += 1
        path.rename(free)
