"""Run the whole main job once per seed, and measure its learning, time and memory."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from time import perf_counter

from rich.console import Console

from slime_spec.bench.memory import TreeMemory
from slime_spec.bench.rows import BenchOptions, Row, at_least, at_most, below
from slime_spec.config.yaml_file import read_yaml_file
from slime_spec.errors import ConfigError
from slime_spec.metrics.jsonl import FILE as METRICS
from slime_spec.metrics.jsonl import read_metrics
from slime_spec.run_folder import SOURCE

SCRIPT = SOURCE / "scripts" / "run-smollm2-135M.sh"
# A file beside the run's own: time and memory, which only the starting process can measure.
MEASURED = "bench.json"
WINDOW = 5


@dataclass(frozen=True)
class Run:
    """Describes one finished run; time and memory are None for a run that this benchmark did not start."""

    seed: int
    steps: list[dict[str, float | None]]
    seconds: float | None
    peak_bytes: int | None


def check_learning(options: BenchOptions) -> None:
    """Refuse folders that hold no run, or a checkout without the script."""
    for folder in options.runs:
        if not (folder / METRICS).is_file() or not (folder / "config.yaml").is_file():
            raise ConfigError(
                "--runs", f"must be run folders (config.yaml, {METRICS})", str(folder), "Pass what --output-dir was."
            )
    if not options.runs and not SCRIPT.is_file():
        raise ConfigError("--only learning", "runs the script of a checkout", str(SCRIPT), "Run it in a checkout.")


def measure(options: BenchOptions) -> list[Row]:
    folders = options.runs or _run_all(options)
    return [row for folder in folders for row in learning_rows(read_run(folder))]


def _run_all(options: BenchOptions) -> list[Path]:
    base = Path("runs").absolute() / f"bench-learning-{datetime.now():%Y%m%d-%H%M%S}"
    folders = [base / f"seed-{seed}" for seed in options.seeds]
    for seed, folder in zip(options.seeds, folders, strict=True):
        run_seed(seed, folder, options.model)
    return folders


def run_seed(seed: int, folder: Path, model: Path, script: Path = SCRIPT) -> None:
    """Run the script with its output on this terminal; leaves MEASURED in the run's folder."""
    command = ["bash", str(script), "--seed", str(seed), "--output-dir", str(folder)]
    Console(stderr=True).print(f"running {shlex.join(command)}", markup=False, highlight=False, soft_wrap=True)
    start = perf_counter()
    environment = {**os.environ, "MODEL_DIR": str(model.absolute())}
    with subprocess.Popen(command, env=environment) as process, TreeMemory(process.pid) as memory:
        code = process.wait()
    if code != 0:
        raise RuntimeError(f"the run of seed {seed} ended with exit code {code}: {shlex.join(command)}")
    measured = {"seed": seed, "seconds": perf_counter() - start, "peak_bytes": memory.peak_bytes}
    (folder / MEASURED).write_text(json.dumps(measured, indent=2) + "\n")


def read_run(folder: Path) -> Run:
    steps = read_metrics(folder / METRICS)
    if not steps:
        raise ConfigError("--runs", "must be runs with at least one step", str(folder), "Let the run finish first.")
    seed = read_yaml_file(folder / "config.yaml")["run"]["seed"]
    measured = json.loads((folder / MEASURED).read_text()) if (folder / MEASURED).is_file() else {}
    return Run(seed, steps, measured.get("seconds"), measured.get("peak_bytes"))


def learning_rows(run: Run) -> list[Row]:
    """Return the rows of one seed's run."""
    prefix = f"learning.seed{run.seed}"
    first, last = (_mean_reward(part) for part in (run.steps[:WINDOW], run.steps[-WINDOW:]))
    compared = [step for step in run.steps if step.get("train/trained_token_share") != 0.0]
    diffs = _values(compared, "train/train_rollout_logprob_abs_diff")
    rows = [
        Row(f"{prefix}.reward_first", f"mean reward of the first {WINDOW} steps, seed {run.seed}", first, "reward"),
        Row(f"{prefix}.reward_last", f"mean reward of the last {WINDOW} steps, seed {run.seed}", last, "reward"),
        at_least(f"{prefix}.rise", "last over first", last - first, "reward", 0.3),
        at_most(f"{prefix}.steps", "steps of the run", len(run.steps), "steps", 40),
        below(
            f"{prefix}.logprob_abs_diff",
            "largest step of train/train_rollout_logprob_abs_diff (a step's mean over tokens)",
            # A step that trained and has no finite value makes the run fail; it is never left out.
            max(diffs) if diffs and len(diffs) == len(compared) else float("nan"),
            "nats/token",
            1e-4,
        ),
        Row(
            f"{prefix}.accept_length", "pooled over the run's verify rounds", _accept_length(run.steps), "tokens/round"
        ),
        Row(
            f"{prefix}.tokens_per_s",
            "median over steps: response tokens over rollout time",
            statistics.median(_values(run.steps, "perf/tokens_per_s")),
            "tokens/s",
        ),
    ]
    if (share := _trained_share(run.steps)) is not None:
        what = "response tokens that were trained on, over the run's; the others have advantage 0"
        rows.append(Row(f"{prefix}.trained_token_share", what, share, "share"))
    if run.seconds is not None:
        rows.append(at_most(f"{prefix}.minutes", "the whole command", run.seconds / 60, "min", 20))
    if run.peak_bytes is not None:
        what = "peak of the whole process tree, PSS sampled every second"
        rows.append(below(f"{prefix}.peak_memory", what, run.peak_bytes / 1e9, "GB", 8))
    return rows


def _values(steps: Sequence[dict[str, float | None]], name: str) -> list[float]:
    return [value for step in steps if (value := step.get(name)) is not None]


def _trained_share(steps: Sequence[dict[str, float | None]]) -> float | None:
    """Return the share of the whole run's response tokens; None for a run that did not tell."""
    shares, counts = (_values(steps, name) for name in ("train/trained_token_share", "train/num_tokens"))
    if not shares:
        return None
    return sum(share * count for share, count in zip(shares, counts, strict=True)) / sum(counts)


def _mean_reward(steps: Sequence[dict[str, float | None]]) -> float:
    rewards = _values(steps, "rollout/reward_mean")
    return statistics.fmean(rewards) if rewards else float("nan")


def _accept_length(steps: Sequence[dict[str, float | None]]) -> float:
    """Return tokens over rounds of the whole run; NaN without speculation."""
    num_tokens = num_rounds = 0.0
    for step in steps:
        length, rounds = step.get("rollout/spec_accept_length"), step.get("spec/verify_rounds")
        if length is not None and rounds is not None:
            num_tokens += length * rounds
            num_rounds += rounds
    return num_tokens / num_rounds if num_rounds else float("nan")
