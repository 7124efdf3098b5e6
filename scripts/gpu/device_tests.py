"""Run the embedded engine's own tests on a device and report them as rows: ``device_tests.py REPORT --device cuda``.

They hold the engine against Hugging Face (fp32 tokens and logits), speculation against none, distributions against
their definition, with the negative controls that must fail, and random requests against a slow sampler in fp64.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from slime_spec.bench.rows import Row, at_least, at_most, report_json

ROOT = Path(__file__).resolve().parents[2]
FILES = (
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
CHOICES = {"device_tests": ("-m", "not proves"), "sampling_laws": ("-m", "proves", "--all")}
SHOWN = 40  # failures that the report names; the log has their tracebacks


def rows_of(junit: Path, choice: str) -> list[Row]:
    """Return how many tests of a choice passed and failed, and which failed, from pytest's JUnit file."""
    passed, failed = 0, []
    for case in ElementTree.parse(junit).iter("testcase"):
        outcomes = {child.tag for child in case}
        if outcomes & {"failure", "error"}:
            failed.append(f"{str(case.get('classname')).rpartition('.')[2]}::{case.get('name')}")
        elif "skipped" not in outcomes:
            passed += 1
    return [
        at_least(f"{choice}.passed", "tests of the embedded engine that passed", passed, "tests", 1),
        at_most(f"{choice}.failed", "; ".join(failed[:SHOWN]) or "tests that failed", len(failed), "tests", 0),
    ]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--processes", default="0", help="pytest's -n")
    parser.add_argument("--choice", choices=CHOICES, default="device_tests")
    parser.add_argument("--match", default="", help="pytest's -k")
    parser.add_argument("--only", nargs="+", default=FILES, help="files of tests/embedded")
    options = parser.parse_args(argv)
    junit = options.report.with_suffix(".xml")
    files = [f"tests/embedded/{name}" for name in options.only]
    # Test by test, for one file may take as long as all others: what a file's tests share is made in a second.
    words = [*CHOICES[options.choice], "-k", options.match, "-n", options.processes, "--dist", "worksteal"]
    words += ["-q", "-p", "no:cacheprovider", "--device", options.device, f"--junitxml={junit}"]
    subprocess.run([sys.executable, "-m", "pytest", *words, *files], cwd=ROOT)
    rows = rows_of(junit, options.choice)
    options.report.write_text(report_json(rows, ["scripts/gpu/device_tests.py", *argv], ()))
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
