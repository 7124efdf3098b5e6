"""A run's folder holds its configuration, its versions and its outputs; nothing in the folder is deleted."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import distributions
from itertools import count
from pathlib import Path

from slime_spec.config.api_key import refuse_literal_keys
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.files import parse_json_object, read_text, write_whole
from slime_spec.folder_lock import FolderLock
from slime_spec.metrics.jsonl import FILE as METRICS
from slime_spec.metrics.wandb import ID_FILE as WANDB_ID
from slime_spec.metrics.wandb import note_repeated

CHECKPOINTS = "checkpoints"  # the trainer's folder in a run's, where trainer.save names no other
logger = logging.getLogger(__name__)

OTHER_FOLDER = "Pass another --run-name or --output-dir, or resume with --load CHECKPOINTS."

# The files of rows, with the key that says which step a row is of.
ROWS = {METRICS: "step", "samples.jsonl": "rollout_id"}
EVALUATION = re.compile(r"step_(\d+)\.jsonl")
SOURCE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class RunFolder:
    """Names the files of a run, and keeps other runs out of its folders until it is closed::

    config.yaml       the resolved configuration; reloading it gives the same configuration
    versions.json     packages, Python, platform, git revision
    command.txt       the command, and the folder that it was given in
    run.log           what the command logged
    metrics.jsonl     one line per step
    report.html       the page of slime-spec report, unless metrics.report_interval=0
    tensorboard/      event files, with --use-tensorboard
    samples.jsonl     one line per sample, with --save-samples
    eval/step_N.jsonl an evaluation before step N: a line per set, and with --save-samples one per sample
    checkpoints/      the trainer's
    hf/               the policy at the end, as a Hugging Face checkpoint
    """

    path: Path
    setting: str
    locks: ExitStack

    @classmethod
    def create(
        cls, config: Config, argv: Sequence[str], config_yaml: str, load: str | None = None, save: str | None = None
    ) -> RunFolder:
        """Make the run's folder, or go on in it; ``save`` is the folder of its checkpoints, where it saves any.

        A folder in use is refused; so is one of a run with another configuration that finished a step, unless this run
        resumes (from ``load``). Raises ConfigError.
        """
        path = folder_of(config)
        setting = "run.output_dir" if config.run.output_dir else "run.name"
        check_run_folder(config, config_yaml, load)
        with ExitStack() as locks:
            try:
                locks.callback(FolderLock(path, setting).close)
                if load is None:  # again, now that no other run can begin here
                    _refuse_another_run(path, config_yaml)
                _write(path / "config.yaml", config_yaml)
                _write(path / "command.txt", command_text(argv))
                _write(path / "versions.json", json.dumps(versions(), indent=2) + "\n")
            except OSError as error:
                raise _unwritable(setting, path, error) from None
            if save is not None and Path(save).resolve() != path.resolve():
                try:
                    locks.callback(FolderLock(Path(save), "trainer.save").close)
                except OSError as error:
                    raise _unwritable("trainer.save", save, error) from None
            return cls(path, setting, locks.pop_all())

    def begin_at(self, rollout_id: int) -> None:
        """Set aside, in the first free numbered files, the rows of an earlier run that this run will write again.

        They are the rows and evaluations of the steps from ``rollout_id`` on: all, where the run starts anew. Raises
        ConfigError where the disk is full.
        """
        try:
            for name, key in ROWS.items():
                aside = _set_aside_rows(self.path / name, key, rollout_id)
                if aside is not None:
                    logger.info("set aside earlier rows from_step=%d file=%s to=%s", rollout_id, name, aside)
                if aside is not None and name == METRICS and (self.path / WANDB_ID).exists():
                    self._go_on_in_wandb(rollout_id, aside)
            for file in (self.path / "eval").glob("step_*.jsonl"):
                if (found := EVALUATION.fullmatch(file.name)) and int(found[1]) >= rollout_id:
                    _set_aside(file)
        except OSError as error:
            raise _unwritable(self.setting, self.path, error) from None

    def _go_on_in_wandb(self, rollout_id: int, aside: Path) -> None:
        """Let a resumed run go on in its wandb run, which has the rows ``aside``; a run from the start has its own."""
        if rollout_id == 0:
            _set_aside(self.path / WANDB_ID)
            return
        num_steps = aside.read_bytes().count(b"\n")
        note_repeated(self.path / WANDB_ID, num_steps)
        logger.info("steps come a second time in the wandb run steps=%d from_step=%d", num_steps, rollout_id)

    def close(self) -> None:
        """Let other runs use the folders."""
        self.locks.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def config_yaml(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    def evaluation(self, step: int) -> Path:
        return self.path / "eval" / f"step_{step}.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "run.log"

    @property
    def hf_export(self) -> Path:
        return self.path / "hf"

    @property
    def draft_export(self) -> Path:
        return self.path / "draft"


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


def check_run_folder(config: Config, config_yaml: str, load: str | None) -> None:
    """Raise ConfigError where the run's folder is another's, or would hold an API key; makes nothing."""
    refuse_literal_keys(config)
    path = folder_of(config)
    _refuse_foreign_content(path)
    if load is None:
        _refuse_another_run(path, config_yaml)


def folder_of(config: Config) -> Path:
    """Return ``run.output_dir``, or ``runs/<name>``."""
    return (Path(config.run.output_dir) if config.run.output_dir else Path("runs") / config.run.name).absolute()


def command_text(argv: Sequence[str]) -> str:
    """Return the text of command.txt, two lines of a shell."""
    return f"cd {shlex.quote(os.getcwd())}\n{shlex.join(argv)}\n"


def _refuse_foreign_content(path: Path) -> None:
    if path.is_file():
        raise ConfigError("run.output_dir", "must be a folder, or absent", str(path), OTHER_FOLDER)
    if path.is_dir() and not (path / "config.yaml").is_file() and list(path.glob("[!.]*")):
        rule = "must be empty, or hold a run (a config.yaml)"
        raise ConfigError("run.output_dir", rule, str(path), OTHER_FOLDER)


def _refuse_another_run(path: Path, config_yaml: str) -> None:
    """Refuse a run of another configuration, unless it never finished a step: nothing of it would be mixed up."""
    earlier = path / "config.yaml"
    if earlier.is_file() and read_text(earlier) != config_yaml and _has_finished_a_step(path):
        raise ConfigError("run.name", "its folder holds a run with another configuration", str(path), OTHER_FOLDER)


def _has_finished_a_step(path: Path) -> bool:
    outputs = [*path.glob(f"{CHECKPOINTS}/step-*"), *path.glob("hf")]
    return bool(outputs) or any(b"\n" in file.read_bytes() for file in path.glob("metrics*.jsonl"))


def _unwritable(setting: str, path: Path | str, error: OSError) -> ConfigError:
    rule = f"must be a folder that can be written: {error.strerror}"
    return ConfigError(setting, rule, str(path), "Make room there, or pass another --output-dir or --save.")


def _set_aside_rows(path: Path, key: str, first: int) -> Path | None:
    """Move the rows whose ``key`` is not below ``first``, and lines that are no rows, to the file that is returned."""
    if not path.is_file() or path.stat().st_size == 0:
        return None
    if first == 0:
        return _set_aside(path)
    with path.open("rb") as lines:
        if not any(_is_from(line, key, first) for line in lines):
            return None
    aside = _free_name(path)
    halves = [each.with_name(f".{each.name}.partial") for each in (path, aside)]
    with path.open("rb") as lines, halves[0].open("wb") as earlier, halves[1].open("wb") as later:
        for line in lines:
            (later if _is_from(line, key, first) else earlier).write(line)
    halves[1].replace(aside)
    halves[0].replace(path)
    return aside


def _is_from(line: bytes, key: str, first: int) -> bool:
    try:
        step = parse_json_object(line.decode(), key).get(key)
    except (UnicodeDecodeError, ConfigError):
        return True
    return not (type(step) is int and step < first)


def _write(path: Path, text: str) -> None:
    """Write the file; an existing file with another text is set aside first."""
    if path.is_file() and path.read_bytes() != text.encode():
        _set_aside(path)
    write_whole(path, text)


def _set_aside(path: Path) -> Path:
    return path.rename(_free_name(path))


def _free_name(path: Path) -> Path:
    """Return the first of ``metrics.1.jsonl``, ``metrics.2.jsonl``, ... that is not there."""
    numbered = (path.with_suffix(f".{number}{path.suffix}") for number in count(1))
    return next(free for free in numbered if not free.exists())
