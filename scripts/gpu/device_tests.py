"""Run the embedded engine's own tests on a device and report them as rows: ``device_tests.py REPORT --device cuda``.

They hold the engine against Hugging Face (fp32 tokens and logits), speculation against none, distributions against
their definition, with the negative controls that must fail, and random requests against a slow sampler in fp64.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from slime_spec.bench.rows import Row, at_least, at_most, report_json

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    "test_fused_blocks.py",
    "test_few_token_products.py",
    "test_decoder_parity.py",
    "test_greedy_grid.py",
    "test_greedy_speculation.py",
    "test_differential.py",
    "test_verify_statistics.py",
    "test_preemption.py",
    "test_partial_samples.py",
    "test_pushes.py",
)
# Which tests: "device_tests" draw 20,000 samples where they count them; "sampling_laws" are the proofs of 200,000.
# Both run whatever tests/proven.json says: it was a CPU that proved that.
CHOICES = {"device_tests": ("-m", "not sampling_law", "--all"), "sampling_laws": ("-m", "sampling_law", "--all")}
SHOWN = 40  # failures that the report names
TOLD_LINES = 12  # the end of a failure's traceback, in the log
GRACE_S = 10  # for the processes to end when the time is up


def rows_of(outcomes: Path, choice: str, ended: bool) -> list[Row]:
    """Return how many tests of a choice passed and failed, and which failed, from the plugin's lines.

    ``ended`` says that pytest came to its end: tests that did not run have no line.
    """
    lines = [json.loads(line) for line in outcomes.read_text().splitlines()]
    failed = sorted({each["test"].rpartition("/")[2] for each in lines if each["outcome"] == "failed"})
    passed = len({each["test"] for each in lines if each["outcome"] == "passed"})
    return [
        at_least(f"{choice}.passed", "tests of the embedded engine that passed", passed, "tests", 1),
        at_most(f"{choice}.failed", "; ".join(failed[:SHOWN]) or "tests that failed", len(failed), "tests", 0),
        at_least(f"{choice}.ended", "whether there was time for all tests", float(ended), "", 1.0),
    ]


def failures_of(outcomes: Path) -> str:
    """Return each failure's name and the end of its traceback."""
    lines = [json.loads(line) for line in outcomes.read_text().splitlines()]
    told = [(each["test"], each["why"].splitlines()[-TOLD_LINES:]) for each in lines if each["outcome"] == "failed"]
    return "\n".join("\n    ".join((f"FAILED {test}", *why)) for test, why in told)


def run_tests(words: Sequence[str], limit_s: float) -> bool:
    """Run pytest for at most this long, 0 for as long as it takes; return whether it came to its end.

    Its processes stay in this one's group, which whoever has started this ends as a whole.
    """
    folder = os.pathsep.join((str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, "-m", "pytest", *words]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": folder})
    try:
        process.wait(limit_s or None)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return False
    return True


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu", "stand-in"), required=True)
    parser.add_argument("--processes", default="0", help="pytest's -n")
    parser.add_argument("--choice", choices=CHOICES, default="device_tests")
    parser.add_argument("--match", default="", help="pytest's -k")
    parser.add_argument("--limit-s", type=float, default=0.0, help="end the tests then; 0: never")
    parser.add_argument("--maxfail", default="0", help="pytest's")
    parser.add_argument("--only", nargs="+", default=FILES, help="files of tests/embedded")
    options = parser.parse_args(argv)
    outcomes = options.report.with_suffix(".jsonl")
    files = [f"tests/embedded/{name}" for name in options.only]
    # Test by test, for one file may take as long as all others: what a file's tests share is made in a second.
    words = [*CHOICES[options.choice], "-k", options.match, "-n", options.processes, "--dist", "worksteal"]
    words += ["-q", "--tb=short", "--no-summary", "--maxfail", options.maxfail, "-p", "no:cacheprovider"]
    words += ["-p", "no:benchmark", "-p", "outcomes", "--outcomes", str(outcomes), "--device", options.device]
    ended = run_tests([*words, *files], options.limit_s)
    if not ended:
        sys.stdout.write(f"ended after {options.limit_s:g} s, before all tests had run\n")
    sys.stdout.write(f"{failures_of(outcomes)}\n")
    rows = rows_of(outcomes, options.choice, ended)
    options.report.write_text(report_json(rows, ["scripts/gpu/device_tests.py", *argv], ()))
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
