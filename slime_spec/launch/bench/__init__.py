"""Benchmarks: each prints a table and writes its rows with the machine, versions, seeds and command that made them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from slime_spec.errors import ConfigError
from slime_spec.interfaces import load_choice, unknown_choice
from slime_spec.launch.bench.rows import Benchmark, BenchOptions, Row, report_json, report_markdown, rows_table

BENCHES = {"main-job": "slime_spec.launch.bench.main_job:MAIN_JOB"}
WIDTH = 160


def run_bench(name: str, argv: Sequence[str]) -> int:
    """Run one benchmark; returns 1 when a row does not reach what it should.

    The files are written again after every part, so that a part that fails takes none of the others' rows with it.
    Raises ConfigError for an unknown benchmark, part or flag, and for inputs that are not there, before it measures.
    """
    bench: Benchmark = load_choice("bench", BENCHES, name)
    options = _parsed(name, bench, argv)
    bench.prepare(options)
    progress = _console(stderr=True)
    rows: list[Row] = []
    for number, part in enumerate(options.parts, 1):
        progress.print(f"measuring {name} {part} ({number} of {len(options.parts)})", markup=False, highlight=False)
        measured: list[Row] = load_choice("--only", bench.parts, part)(options)
        if len(options.parts) > 1:
            progress.print(rows_table(measured))
        rows += measured
        report = report_json(rows, ["slime-spec", "bench", name, *argv], options.seeds)
        if options.json is not None:
            options.json.write_text(report + "\n")
        if options.markdown is not None:
            options.markdown.write_text(report_markdown(report))
    _console(stderr=False).print(rows_table(rows))
    return 0 if all(row.holds is not False for row in rows) else 1


def _console(stderr: bool) -> Console:
    """A console wide enough for the table where no terminal says how wide it is."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=WIDTH)


def _parsed(name: str, bench: Benchmark, argv: Sequence[str]) -> BenchOptions:
    parser = _Parser(prog=f"slime-spec bench {name}", description=bench.what)
    parser.add_argument("--json", type=Path, help="write the rows here, with machine, versions, seeds and command")
    parser.add_argument("--markdown", type=Path, help="write the rows here as a table")
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"measure only these: {', '.join(bench.parts)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of what is random (0 1 2)")
    parser.add_argument("--model", type=Path, default=BenchOptions.model, help="checkpoint folder that is measured")
    parser.add_argument("--rounds", type=int, default=BenchOptions.num_rounds, help="timed rounds; medians count (5)")
    parser.add_argument("--new-tokens", type=int, default=BenchOptions.num_new_tokens, help="tokens a reply (64)")
    parser.add_argument("--runs", nargs="+", type=Path, default=[], help="read these finished runs, start none")
    given = parser.parse_args(argv)
    for part in given.only or ():
        if part not in bench.parts:
            raise unknown_choice("--only", bench.parts, part)
    for flag, value, least in (("--rounds", given.rounds, 1), ("--new-tokens", given.new_tokens, 2)):
        if value < least:
            raise ConfigError(flag, f"must be at least {least}", value, f"Pass {flag} {least} or more.")
    for flag, path in (("--json", given.json), ("--markdown", given.markdown)):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(flag, "must lie in a folder that is there", str(path), f"Make {path.parent} first.")
    return BenchOptions(
        parts=tuple(given.only or bench.parts),
        seeds=tuple(given.seeds),
        model=given.model,
        runs=tuple(given.runs),
        num_rounds=given.rounds,
        num_new_tokens=given.new_tokens,
        json=given.json,
        markdown=given.markdown,
    )


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are ConfigErrors, as everywhere on this command line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(self.prog, message, " ".join(sys.argv[1:]), f"See {self.prog} --help.")
