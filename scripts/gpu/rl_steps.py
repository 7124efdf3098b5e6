"""Whole steps of RL with speculation on and off, in turns, as rows: ``rl_steps.py REPORT --num-gpus 1``.

Engine and trainer share the device, as in a colocated run. The first step of each run warms up and is left out.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from slime_spec.bench.rows import Row, report_json
from slime_spec.metrics.jsonl import read_metrics

TIMES = ("rollout_time", "train_time", "sync_time", "step_time")
OFF = ("speculative.algorithm=NONE", "speculative.draft_model_path=null", "speculative.use_rejection_sampling=false")
ON_GPU = ("engine.dtype=bfloat16", "trainer.dtype=bfloat16", "rollout.max_response_len=256")
STACK_EVERY_S, END_S, LOG_TAIL = 20, 15.0, 1_500
RAY_LOGS = "ray/session_latest/logs"  # in RAY_TMPDIR
QUIET_LOGS = ("debug_state", "monitor", "dashboard", "log_monitor")
STACKS = """
import faulthandler, os, sys
told = open(f"{folder}/{{os.getpid()}}.txt", "w")
told.write(open(f"/proc/{{os.getpid()}}/cmdline").read().replace(chr(0), " ")[:300] + chr(10))
told.flush()
faulthandler.dump_traceback_later({every_s}, repeat=True, file=told)
"""
SMALL = ("rollout.batch_size=2", "rollout.n_samples_per_prompt=2", "rollout.max_response_len=8")


def arguments(speculates: bool, options: argparse.Namespace) -> list[str]:
    """Return the command line of one run: the main job, or a small one of the tiny policy of a rehearsal."""
    words = ["train", "--config", "smollm2-135m", "--num-rollout", str(options.num_rollout), "--no-console"]
    words += [f"rollout.num_gpus_per_engine={options.num_gpus}", f"trainer.num_gpus={options.num_gpus}"]
    words += ON_GPU if options.num_gpus else ()
    if options.policy is not None:
        words += [f"model.hf_checkpoint={options.policy}", f"speculative.draft_model_path={options.draft}", *SMALL]
    return [*words, *(() if speculates else OFF), "trainer.save_final=false", *options.settings]


def run(folder: Path, speculates: bool, options: argparse.Namespace) -> list[dict[str, float | None]]:
    """Run a job; return the metrics of its steps, without the first where there are others.

    Raises SystemExit for a run that fails, and for one that does not end in time once all has told where it stands.
    """
    words = [*arguments(speculates, options), "--output-dir", str(folder)]
    stacks = folder.with_name(f"{folder.name}s")  # a short name, since Ray's sockets lie below
    side = f"the run with speculation {'on' if speculates else 'off'}"
    # In this process's group, so that whoever ends the group ends the run.
    process = subprocess.Popen([sys.executable, "-m", "slime_spec", *words], env=tells_its_stacks(stacks))
    try:
        code = process.wait(options.limit_s)
    except subprocess.TimeoutExpired:
        code = None
        say(standing(stacks))
    finally:
        end(process)
    if code != 0:
        raise SystemExit(f"{side} {f'did not end in {options.limit_s} s' if code is None else f'ended with {code}'}")
    steps = read_metrics(folder / "metrics.jsonl")
    return steps[1:] or steps


def tells_its_stacks(stacks: Path) -> dict[str, str]:
    """Return an environment in which every Python process, an actor too, writes all threads' stacks now and then.

    Ray's session lies in the same folder.
    """
    stacks.mkdir()
    (stacks / "sitecustomize.py").write_text(STACKS.format(folder=str(stacks), every_s=STACK_EVERY_S))
    found = f"{stacks}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return {**os.environ, "PYTHONPATH": found, "RAY_TMPDIR": str(stacks)}


def standing(stacks: Path) -> str:
    """Return the newest stacks of the processes of a run that does not end, and the ends of Ray's logs."""
    told = []
    for path in sorted(stacks.glob("*.txt")):
        command, *dumps = path.read_text(errors="replace").split("Timeout (")
        if dumps:
            told.append(f"== stacks of {command.strip()}\n{dumps[-1]}")
    for path in sorted((stacks / RAY_LOGS).glob("*.*")):
        if (
            path.is_file()
            and not path.name.startswith(QUIET_LOGS)
            and (text := path.read_text(errors="replace").strip())
        ):
            told.append(f"== end of {path.name}\n{text[-LOG_TAIL:]}")
    return "\n".join(told)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a run in order, or by force; what it started ends with it."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    process.kill()
    process.wait()


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def rows_of(on: Sequence[dict[str, float | None]], off: Sequence[dict[str, float | None]]) -> list[Row]:
    """Return the medians of the steps' times, on and off, the shares of a step, and the ratios."""
    rows = []
    for name in TIMES:
        medians = {side: median(steps, f"perf/{name}") for side, steps in (("on", on), ("off", off))}
        for side, value in medians.items():
            rows.append(Row(f"rl.{side}.{name}", f"speculation {side}: median of the steps' perf/{name}", value, "s"))
            share = value / median(on if side == "on" else off, "perf/step_time")
            rows.append(Row(f"rl.{side}.{name}_share", f"speculation {side}: share of a step", share, "share"))
        ratio = medians["off"] / medians["on"]
        rows.append(Row(f"rl.{name}.off_over_on", f"perf/{name} without speculation over with it", ratio, "x"))
    rows.append(accept_length(on))
    return rows


def accept_length(on: Sequence[dict[str, float | None]]) -> Row:
    """Return the median of the steps' accept lengths, without a number where the engine verified no draft."""
    name, what, key = "rl.on.accept_length", "tokens a verify round of the main job", "rollout/spec_accept_length"
    if all(step.get(key) is None for step in on):
        return Row(name, f"{what}: no draft was worth verifying", math.nan, "")
    return Row(name, what, median(on, key), "tokens")


def median(steps: Sequence[dict[str, float | None]], name: str) -> float:
    return statistics.median(value for step in steps if (value := step.get(name)) is not None)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("--num-gpus", type=int, choices=(0, 1), required=True)
    parser.add_argument("--turns", type=int, default=2, help="runs, with speculation on and off in turn (2)")
    parser.add_argument("--num-rollout", type=int, default=1, help="steps of a run (1)")
    parser.add_argument("--limit-s", type=float, default=120.0, help="seconds a run may last (120)")
    parser.add_argument("--settings", nargs="+", default=(), help="of the runs, as push.transport=object_store")
    parser.add_argument("--policy", type=Path, help="a tiny checkpoint, for a rehearsal")
    parser.add_argument("--draft", type=Path, help="its draft")
    options = parser.parse_args(argv)
    steps: dict[bool, list[dict[str, float | None]]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.turns):
            speculates = turn % 2 == 0
            steps[speculates] += run(Path(folder) / str(turn), speculates, options)
            if all(steps.values()):
                rows = rows_of(steps[True], steps[False])
                options.report.write_text(report_json(rows, ["scripts/gpu/rl_steps.py", *argv], ()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
