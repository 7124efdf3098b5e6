"""The command ``slime-spec port`` prints what a slime launch script is here, or runs it."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from slime_spec.launch.port.ported import ON_CPU, Fate, Ported, port
from slime_spec.launch.port.script import read_script
from slime_spec.launch.port.text import quoted, shown

WIDTH, FLAG_WIDTH = 116, 44
EPILOG = """\
The command goes to standard output, the table of what became of each flag to standard error. Nothing of the script is
run. Variables are taken from the environment where the script does not set them: BASE_DIR=/data slime-spec port SCRIPT
Exit code: 0 where every flag has a place here, 1 where something is missing, 2 where the script cannot be read.
"""
TITLES = {
    Fate.MISSING: "missing here",
    Fate.MAPPED: "mapped",
    Fate.ADDED: "added",
    Fate.IGNORED: "no effect, because",
    Fate.SAME: "the same here",
}


def run_port(
    argv: Sequence[str], show: Callable[[str], None], tell: Callable[[str], None], train: Callable[[list[str]], int]
) -> int:
    """Port a script: ``show`` has the command, ``tell`` the table; with --run ``train`` runs the command's words."""
    own, extra = _split(argv)
    options = _parser().parse_args(own)
    launch = read_script(options.script, os.environ)
    ported = port(launch, [*(ON_CPU if options.on_cpu else ()), *extra])
    if not options.run:
        show("\n".join(command_lines(ported, launch.files[0].name)))
    tell("\n".join(table_lines(ported)))
    if ported.missing or (options.run and ported.is_open):
        if options.run:
            tell("not run, for what is missing or not set: pass it after --, or run what is printed without --run,")
            tell("which leaves out what is missing")
        return 1
    return train([shown(word) for word in ported.words]) if options.run else 0


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words before ``--`` and those after."""
    words = list(argv)
    end = words.index("--") if "--" in words else len(words)
    return words[:end], words[end + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slime-spec port",
        usage="slime-spec port SCRIPT [--run] [--on-cpu] [-- FLAGS of slime-spec train, which win]",
        description="Print the slime-spec command that a launch script of slime's is equivalent to.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("script", type=Path, help="a bash script that calls slime's train.py or train_async.py")
    parser.add_argument("--run", action="store_true", help="run the command, where nothing is missing")
    parser.add_argument(
        "--on-cpu",
        action="store_true",
        help="one embedded engine and one trainer rank on this machine's cores, in place of the script's GPUs; "
        "for a try, with a small checkpoint after --",
    )
    return parser


def command_lines(ported: Ported, name: str) -> Iterator[str]:
    """Yield a shell script: a line for each flag, the script's own arguments last."""
    yield f"# {name}, by slime-spec port"
    for variable in ported.unset:
        yield f': "${{{variable}:?is not set}}"'
    lines = ["slime-spec train", *(" ".join(map(quoted, flag)) for flag in ported.flags)]
    yield " \\\n    ".join([" ".join(lines[:2]), *lines[2:], '"$@"'])


def table_lines(ported: Ported) -> Iterator[str]:
    """Yield the table, what is missing last, where a terminal shows it."""
    for fate in reversed(TITLES):
        rows = [row for row in ported.rows if row.fate is fate]
        if not rows:
            continue
        yield f"{TITLES[fate]} ({len(rows)})"
        if fate is Fate.IGNORED:
            for why in dict.fromkeys(row.why for row in rows):
                flags = ", ".join(row.flag for row in rows if row.why == why)
                yield from _wrapped(f"  {why}:", flags)
        elif fate is Fate.SAME:
            yield from _wrapped(" ", " ".join(row.flag.partition(" ")[0] for row in rows))
        else:
            for row in rows:
                yield from _wrapped(f"  {row.flag:{FLAG_WIDTH}}", row.why)
    if ported.not_followed:
        yield f"lines of the script that could not be followed ({len(ported.not_followed)})"
        yield from (f"  {line}" for line in ported.not_followed)
    if ported.unset:
        yield f"variables to set: {' '.join(ported.unset)}"


def _wrapped(start: str, text: str) -> list[str]:
    return textwrap.wrap(f"{start} {text}", WIDTH, subsequent_indent=" " * 6, break_on_hyphens=False)
