"""The robustness benchmark's kinds of inputs, and its flags."""

from __future__ import annotations

from argparse import Action, ArgumentParser, Namespace
from collections.abc import Sequence

from slime_spec.bench.rows import Benchmark, BenchOptions
from slime_spec.errors import ConfigError

HERE = "slime_spec.bench.robustness"
KINDS = {
    "checkpoints": f"{HERE}.checkpoints:measure",
    "drafts": f"{HERE}.drafts:measure",
    "commands": f"{HERE}.commands:measure",
    "http": f"{HERE}.http:measure",
    "rows": f"{HERE}.rows:measure",
}


def prepare(options: BenchOptions) -> None:
    """See Benchmark."""
    for flag, value in (("--count", options.count), ("--seconds", options.seconds)):
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(flag, "must be above 0", value, f"Pass {flag} 100.")


def add_flags(parser: ArgumentParser) -> None:
    """See Benchmark."""
    names = ", ".join(KINDS)
    parser.add_argument("--kind", dest="parts", nargs="+", action=_Kinds, help=f"kinds of inputs: all, or {names}")
    parser.add_argument("--count", metavar="N", type=int, help="inputs of each kind (thousands; see the table)")
    parser.add_argument(
        "--seed", dest="seeds", nargs=1, metavar="S", type=int, help="seed of the first input; the next has S + 1 (0)"
    )
    parser.add_argument("--seconds", metavar="T", type=float, help="longest time for each kind (no limit)")


class _Kinds(Action):
    """Takes ``all`` for every kind."""

    def __call__(self, parser: ArgumentParser, options: Namespace, values: object, _: object = None) -> None:
        assert isinstance(values, Sequence), "nargs='+' gives a list"
        setattr(options, self.dest, [] if "all" in values else values)


ROBUSTNESS = Benchmark(
    what="Hostile inputs by seed: damaged checkpoints and drafts, command lines, YAML, HTTP bodies, rows of data.",
    parts=KINDS,
    prepare=prepare,
    add_flags=add_flags,
    defaults=BenchOptions(seeds=(0,)),
)
