"""The command ``slime-spec report RUN [RUN ...]`` writes a page of runs that opens without any network."""

from __future__ import annotations

import time
import webbrowser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slime_spec.errors import ConfigError
from slime_spec.report.folder import read_runs
from slime_spec.report.measured import SUFFIXES, read_measured
from slime_spec.report.page import FILE, Page, write_page

USAGE = """\
slime-spec report RUN [RUN ...] [FILE.json|FILE.svg ...] [--out FILE] [--watch [SECONDS]] [--open yes|no]

  Writes one HTML file of one or several runs, each a run's folder or its metrics.jsonl: rewards, lengths, acceptance
  by step, position and version, what speculation gained, phases of a step, pushes, drafts that learn, evaluations,
  samples (of runs with --save-samples) and settings. Several runs are drawn over each other. The file needs no network.
  FILE.json and FILE.svg are what slime-spec bench and slime-spec tune wrote with --json and --chart.

  --out FILE           the file to write (default: report.html in the run's folder; ./report.html for several runs)
  --watch [SECONDS]    write it again every so many seconds (10) while a run goes on; an open page reads itself again
  --open yes|no        open the page in a browser (no)"""
LEAST_S, DEFAULT_S, MOST_S = 1.0, 10.0, 3600.0


@dataclass(frozen=True)
class Options:
    """Holds the words of the command line; ``watch_s`` is None where the page is written once."""

    runs: tuple[Path, ...]
    measured: tuple[Path, ...]
    out: Path
    watch_s: float | None = None
    opens: bool = False


def run_report(argv: Sequence[str], show: Callable[[str], None], sleep: Callable[[float], None] = time.sleep) -> int:
    """Run the command and return its exit code; ``sleep`` waits between two pages of a run that goes on."""
    if {"-h", "--help"} & set(argv):
        show(USAGE)
        return 0
    options = read_options(argv)
    goes_on = _write(options)
    show(str(options.out))
    if options.opens:
        webbrowser.open(options.out.absolute().as_uri())
    while goes_on:
        assert options.watch_s is not None, "a page that is written once does not go on"
        sleep(options.watch_s)
        goes_on = _write(options)
    return 0


def _write(options: Options) -> bool:
    """Write the page, and return whether to write it again: a run is watched as long as it goes on."""
    runs = read_runs(options.runs)
    goes_on = options.watch_s is not None and any(run.is_running for run in runs)
    measured = tuple(read_measured(path) for path in options.measured)
    write_page(options.out, Page(runs, measured, options.watch_s if goes_on else None))
    return goes_on


def read_options(argv: Sequence[str]) -> Options:
    """Return the options of a command line; raises ConfigError for what is no flag of the command, or not there."""
    paths: list[Path] = []
    out: Path | None = None
    watch_s: float | None = None
    opens = False
    words = list(argv)
    while words:
        name, equals, value = words.pop(0).partition("=")
        if name == "--watch":
            given = value if equals else (words.pop(0) if words and _is_number(words[0]) else "")
            watch_s = _seconds(given) if given else DEFAULT_S
        elif name in ("--out", "--open"):
            if not equals and not words:
                raise ConfigError(name, "needs a value", None, f"Pass {name} {'FILE' if name == '--out' else 'no'}.")
            value = value if equals else words.pop(0)
            out, opens = (Path(value), opens) if name == "--out" else (out, _yes(value))
        elif name.startswith("-"):
            raise ConfigError(name, "is no flag of slime-spec report", argv, "See slime-spec report --help.")
        else:
            paths.append(Path(name + equals + value))
    return _checked(paths, out, watch_s, opens)


def _checked(paths: Sequence[Path], out: Path | None, watch_s: float | None, opens: bool) -> Options:
    if not paths:
        raise ConfigError("slime-spec report", "needs a run's folder", None, "Pass runs/NAME.")
    for path in paths:
        if not path.exists():
            raise ConfigError("slime-spec report", "must be there", str(path), "Pass runs/NAME.")
    runs = tuple(path for path in paths if path.suffix not in SUFFIXES)
    measured = tuple(path for path in paths if path.suffix in SUFFIXES)
    if out is None:
        out = (runs[0] if runs[0].is_dir() else runs[0].parent) / FILE if len(runs) == 1 else Path(FILE)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ConfigError("--out", "must be a file in a folder that is there", str(out), "Pass --out report.html.")
    return Options(runs, measured, out, watch_s, opens)


def _is_number(word: str) -> bool:
    return word.replace(".", "", 1).isdecimal() and not Path(word).exists()


def _seconds(word: str) -> float:
    try:
        seconds = float(word)
    except ValueError:
        seconds = 0.0
    if not LEAST_S <= seconds <= MOST_S:
        rule = f"must be seconds between {LEAST_S:g} and {MOST_S:g}"
        raise ConfigError("--watch", rule, word, f"Pass --watch {DEFAULT_S:g}.")
    return seconds


def _yes(word: str) -> bool:
    if word not in ("yes", "no"):
        raise ConfigError("--open", "must be yes or no", word, "Pass --open no.")
    return word == "yes"
