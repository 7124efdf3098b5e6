"""Findings as a table, as JSON, and as the flags that would mend them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from slime_spec.launch.doctor.checks import TRAPS
from slime_spec.launch.doctor.finding import Finding, Severity

STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.INFO: "cyan"}
EXIT_CODES = {Severity.ERROR: 2, Severity.WARNING: 1, Severity.INFO: 0}


def exit_code(findings: Iterable[Finding]) -> int:
    """2 with an error, 1 with a warning, else 0."""
    return max((EXIT_CODES[finding.severity] for finding in findings), default=0)


def as_json(findings: Sequence[Finding], sglang: str | None) -> str:
    counts = {severity.value: sum(each.severity is severity for each in findings) for severity in Severity}
    return json.dumps(
        {
            "sglang": sglang,
            "num_checks": len(TRAPS),
            **counts,
            "fix": flags_to_add(findings),
            "findings": [each.to_dict() for each in findings],
        },
        indent=2,
    )


def flags_to_add(findings: Sequence[Finding]) -> list[str]:
    """The fixes of errors and warnings, each flag once: where two findings disagree, the graver one's value stays."""
    chosen: dict[str, list[str]] = {}
    for finding in findings:
        if finding.severity is Severity.INFO:
            continue
        for flag, values in _by_flag(finding.fix):
            chosen.setdefault(flag, values)
    return [word for flag, values in chosen.items() for word in (flag, *values)]


def _by_flag(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    flags: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            flags.append((word, []))
        else:
            flags[-1][1].append(word)
    return flags


def as_table(findings: Sequence[Finding], judged: str) -> RenderableType:
    """What a person reads; ``judged`` says which SGLang the checks speak of."""
    summary = ", ".join(
        f"{number} {severity.value}{'s' if number != 1 else ''}"
        for severity in (Severity.ERROR, Severity.WARNING, Severity.INFO)
        if (number := sum(each.severity is severity for each in findings))
    )
    head = Text(f"{len(TRAPS)} checks for {judged}: {summary or 'nothing found'}")
    if not findings:
        return head
    table = Table(show_lines=True, expand=True)
    table.add_column("check", no_wrap=True)
    table.add_column("what was read, why it matters, what to do", ratio=1, overflow="fold")
    for each in findings:
        name = Text.assemble((each.id, STYLES[each.severity]), f"\n{each.severity.value}")
        links = "\n".join(each.links)
        table.add_row(
            name,
            Text.assemble(
                (each.read, "bold"), f"\n{each.why}\n", (f"-> {each.remedy}", "green"), (f"\n{links}", "dim")
            ),
        )
    return Group(head, table)


def as_flags(findings: Sequence[Finding]) -> str:
    """One line to append to the command; empty where nothing has a flag that mends it."""
    return shlex.join(flags_to_add(findings))


def width() -> int:
    """The terminal's width, or 120 columns into a pipe."""
    console = Console()
    return console.width if console.is_terminal else 120
