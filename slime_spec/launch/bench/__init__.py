"""Benchmarks: each prints a table and writes its rows with the machine, versions, seeds and command that made them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from slime_spec.interfaces import load_choice
from slime_spec.launch.bench.rows import Benchmark, report_json, rows_table

BENCHES = {"main-job": "slime_spec.launch.bench.main_job:MAIN_JOB"}


def run_bench(name: str, argv: Sequence[str]) -> int:
    """Run one benchmark; returns 1 when a row does not reach what it should."""
    bench: Benchmark = load_choice("bench", BENCHES, name)
    parser = argparse.ArgumentParser(prog=f"slime-spec bench {name}", description=bench.what)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--only", nargs="+", choices=list(bench.parts), help="measure only these parts")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of what is random")
    options = parser.parse_args(argv)
    console = Console(stderr=True)
    rows = []
    for part in options.only or bench.parts:
        console.print(f"measuring {part}", markup=False)
        rows += bench.parts[part](tuple(options.seeds))
        console.print(rows_table(rows))
    if options.json:
        options.json.write_text(report_json(rows, sys.argv, options.seeds))
    return 0 if all(row.holds is not False for row in rows) else 1
