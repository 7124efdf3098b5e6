"""This module writes findings as text, as JSON, and as the flags that would fix them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from slime_spec.columns import WIDEST
from slime_spec.preflight.checks import TRAPS
from slime_spec.preflight.finding import Finding, Severity

STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.INFO: "cyan"}
EXIT_CODES = {Severity.ERROR: 2, Severity.WARNING: 1, Severity.INFO: 0}


def exit_code(findings: Iterable[Finding]) -> int:
    """Return the exit code: 2 with an error, 1 with a warning, else 0."""
    return max((EXIT_CODES[finding.severity] for finding in findings), default=0)


def as_json(findings: Sequence[Finding], sglang: str | None, skipped: Collection[str] = ()) -> str:
    """Return the findings as JSON, with the keys of docs/doctor.md.

    ``sglang`` is the judged version, None without SGLang.
    """
    counts = {severity.value: sum(each.severity is severity for each in findings) for severity in Severity}
    return json.dumps(
        {
            "sglang": sglang,
            "num_checks": len(TRAPS),
            **counts,
            "skipped": sorted(skipped),
            "fix": flags_to_add(findings),
            "findings": [each.to_dict() for each in findings],
        },
        indent=2,
    )


def flags_to_add(findings: Sequence[Finding]) -> list[str]:
    """Return the fixes of errors and warnings, each flag once.

    Where two findings disagree, the more severe one's stays.
    """
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


def as_flags(findings: Sequence[Finding]) -> str:
    """Return one line to append to the command; empty where no finding has a flag that fixes it."""
    return shlex.join(flags_to_add(findings))


def as_text(findings: Sequence[Finding], judged: str, skipped: Collection[str] = ()) -> RenderableType:
    """Return the text that a person reads: errors and warnings in full, then the infos, a line each."""
    parts: list[RenderableType] = [Text(f"{len(TRAPS)} checks of {judged}: {_summary(findings) or 'nothing found'}")]
    for each in findings:
        if each.severity is not Severity.INFO:
            parts += [Text(), headline(each, skipped), _facts(each)]
    if fix := as_flags(findings):
        parts += [Text(), Text.assemble(("to add: ", "bold"), fix)]
    infos = [each for each in findings if each.severity is Severity.INFO]
    if infos:
        parts += [Text(), Text("good to know", style="bold"), brief(infos)]
    return Group(*parts)


def headline(finding: Finding, skipped: Collection[str]) -> Text:
    """Return ``error min-p``, and whether --skip-check names it."""
    mark = " (skipped)" if finding.id in skipped else ""
    return Text.assemble((finding.severity.value, STYLES[finding.severity]), f" {finding.id}{mark}")


def brief(findings: Sequence[Finding]) -> RenderableType:
    """Return a finding in brief: what was read and what to do, without reason and links."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for each in findings:
        table.add_row(Text(each.id, style=STYLES[each.severity]), Text(f"{each.read}. {each.remedy}"))
    return Padding(table, (0, 0, 0, 2))


def _facts(finding: Finding) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    table.add_row("read", Text(finding.read))
    table.add_row("why", Text(finding.why))
    table.add_row("do", Text(finding.remedy, style="green"))
    if finding.links:
        table.add_row("see", Text(_short(finding.links), style="dim"))
    return Padding(table, (0, 0, 0, 2))


def _short(links: Sequence[str]) -> str:
    """Return the links in short; an issue of the same repository as the previous link is only its number."""
    shown, before = [], ""
    for link in links:
        base, _, number = link.rpartition("/")
        shown.append(f"#{number}" if base == before and number.isdigit() else link)
        before = base
    return " ".join(shown)


def _summary(findings: Sequence[Finding]) -> str:
    return ", ".join(
        f"{number} {'good to know' if severity is Severity.INFO else severity.value + 's' * (number != 1)}"
        for severity in Severity
        if (number := sum(each.severity is severity for each in findings))
    )


def width() -> int:
    """Return the terminal's width, at most 120 columns; a pipe counts as 120 columns wide."""
    console = Console()
    return min(console.width, WIDEST) if console.is_terminal else WIDEST
