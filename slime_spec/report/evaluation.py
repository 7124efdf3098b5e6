"""This module makes charts of evaluations: for each set its reward, accuracy with its interval, pass@k and others."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from slime_spec.report.folder import ReportedRun
from slime_spec.report.series import NUMBER, ChartData, Line, line_of

NAME = re.compile(r"eval/(?P<set>[^/]+)(/(?P<what>.+))?")
ENDS = ("_low", "_high")  # of a metric's interval
UNITS = {"accuracy": "share", "spec_accept_length": "tokens/round", "response_len_mean": "tokens", "": "reward"}
TITLES = {"": "reward", "response_len_mean": "response length", "spec_accept_length": "accepted length"}
PASS = "pass@"


def evaluation_charts(runs: Sequence[ReportedRun]) -> Iterator[ChartData]:
    """Yield the charts of every set that a run was evaluated on; pass@k, of several lines, has a chart for each run."""
    found = [match for run in runs for name in run.names if (match := NAME.fullmatch(name))]
    for name in dict.fromkeys(match["set"] for match in found):
        whats = list(dict.fromkeys(match["what"] or "" for match in found if match["set"] == name))
        for what in sorted(whats, key=lambda each: (list(UNITS).index(each) if each in UNITS else len(UNITS), each)):
            if not what.endswith(ENDS) and not what.startswith(PASS):
                yield _chart(name, what, runs)
        if any(what.startswith(PASS) for what in whats):
            yield from _of_several_samples(name, runs)


def _chart(name: str, what: str, runs: Sequence[ReportedRun]) -> ChartData:
    metric = f"eval/{name}/{what}" if what else f"eval/{name}"
    ends = (f"{metric}{ENDS[0]}", f"{metric}{ENDS[1]}")
    lines = [line_of(run, index, metric, ends=ends) for index, run in enumerate(runs) if metric in run.names]
    note = "With its interval of 95 %." if any(line.band for line in lines) else ""
    return ChartData(
        f"{name}: {TITLES.get(what, what.replace('_', ' '))}", UNITS.get(what, ""), tuple(lines), note=note
    )


def _of_several_samples(name: str, runs: Sequence[ReportedRun]) -> Iterator[ChartData]:
    prefix = f"eval/{name}/{PASS}"
    for index, run in enumerate(runs):
        named = (each.removeprefix(prefix) for each in run.names if each.startswith(prefix))
        counts = sorted(int(each) for each in named if NUMBER.fullmatch(each))
        lines: list[Line] = [
            line_of(run, index, f"{prefix}{count}", f"{PASS}{count}", shade=shade) for shade, count in enumerate(counts)
        ]
        if lines:
            owner = f": {run.name}" if len(runs) > 1 else ""
            note = "One of k samples is right."
            yield ChartData(f"{name}: pass@k{owner}", "share", tuple(lines), "shades", note)
