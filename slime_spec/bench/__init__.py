"""Each benchmark prints a table and writes its rows with the machine, versions, seeds and command that made them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from slime_spec.bench.rows import Benchmark, BenchOptions, Row, report_json, report_markdown, rows_table
from slime_spec.errors import ConfigError
from slime_spec.interfaces import load_choice, unknown_choice

BENCHES = {
    "main-job": "slime_spec.bench.main_job:MAIN_JOB",
    "engine": "slime_spec.bench.engine_speed:ENGINE_SPEED",
    "sglang": "slime_spec.bench.sglang.benchmark:SGLANG",
    "device": "slime_spec.bench.device.benchmark:DEVICE",
    "pays": "slime_spec.bench.pays.benchmark:PAYS",
    "drafts": "slime_spec.bench.online_drafts.benchmark:DRAFTS",
    "coordinator": "slime_spec.bench.coordinator:COORDINATOR",
    "robustness": "slime_spec.bench.robustness.benchmark:ROBUSTNESS",
}
WIDTH = 160


def run_bench(name: str, argv: Sequence[str]) -> int:
    """Run one benchmark; returns 1 when a row does not reach what it should.

    The files are written again after every part, so that a part that fails takes none of the others' rows with it.
    Raises ConfigError for an unknown benchmark, part or flag, and for inputs that are not there, before it measures.
    """
    bench: Benchmark = load_choice("bench", BENCHES, name)
    options = parse_options(name, bench, argv)
    bench.prepare(options)
    progress = _console(stderr=True)
    rows: list[Row] = []
    for number, part in enumerate(options.parts, 1):
        progress.print(f"measuring {name} {part} ({number} of {len(options.parts)})", markup=False, highlight=False)
        measured: list[Row] = load_choice("--only", bench.parts, part)(options)
        if len(options.parts) > 1:
            progress.print(rows_table(measured))
        rows += measured
        report = report_json(rows, ["slime-spec", "bench", name, *argv], options.seeds, bool(options.num_gpus))
        if options.json is not None:
            options.json.write_text(report + "\n")
        if options.markdown is not None:
            options.markdown.write_text(report_markdown(report))
    _console(stderr=False).print(rows_table(rows))
    return 0 if all(row.holds is not False for row in rows) else 1


def _console(stderr: bool) -> Console:
    """Make a console that is wide enough for the table where no terminal gives a width."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=WIDTH)


def parse_options(name: str, bench: Benchmark, argv: Sequence[str]) -> BenchOptions:
    """Return the options of a command line; raises ConfigError for what is not a flag or a part, or out of bounds."""
    parser = _Parser(prog=f"slime-spec bench {name}", description=bench.what)
    parser.set_defaults(**vars(bench.defaults))
    rounds, new_tokens = bench.defaults.num_rounds, bench.defaults.num_new_tokens
    parser.add_argument("--json", type=Path, help="write the rows here, with machine, versions, seeds and command")
    parser.add_argument("--markdown", type=Path, help="write the rows here as a table")
    parser.add_argument(
        "--only", dest="parts", nargs="+", metavar="PART", help=f"measure only these: {', '.join(bench.parts)}"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds of what is random (0 1 2)")
    parser.add_argument("--model", type=Path, help="checkpoint folder that is measured")
    parser.add_argument(
        "--rounds", dest="num_rounds", metavar="N", type=int, help=f"timed rounds; medians count ({rounds})"
    )
    parser.add_argument(
        "--new-tokens", dest="num_new_tokens", metavar="N", type=int, help=f"tokens a reply ({new_tokens})"
    )
    bench.add_flags(parser)
    given = vars(parser.parse_args(argv))
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    options = BenchOptions(**values)
    _check(options, bench)
    return options if options.parts else replace(options, parts=tuple(bench.parts))


def _check(options: BenchOptions, bench: Benchmark) -> None:
    for part in options.parts:
        if part not in bench.parts:
            raise unknown_choice("--only", bench.parts, part)
    counts = (
        ("--rounds", options.num_rounds, 1),
        ("--new-tokens", options.num_new_tokens, 2),
        ("--threads", options.threads, 1),
        ("--num-prompts", options.num_prompts, 1),
        ("--num-gpus", options.num_gpus, 0),
        ("--seconds", options.seconds, 0),
        *(("--batch-sizes", size, 1) for size in options.batch_sizes),
    )
    for flag, value, least in counts:
        if value is not None and value < least:
            raise ConfigError(flag, f"must be at least {least}", value, f"Pass {flag} {least} or more.")
    for flag, path in (("--json", options.json), ("--markdown", options.markdown), ("--chart", options.chart)):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(flag, "must lie in a folder that is there", str(path), f"Make {path.parent} first.")


class _Parser(argparse.ArgumentParser):
    """Parses with argparse, whose complaints become ConfigErrors, as everywhere on this command line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(self.prog, message, " ".join(sys.argv[1:]), f"See {self.prog} --help.")
