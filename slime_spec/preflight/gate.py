"""The gate runs all checks on one configuration: errors stop the launch, warnings are logged once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from slime_spec.errors import ConfigError
from slime_spec.preflight.checks import TRAPS
from slime_spec.preflight.facts import Facts
from slime_spec.preflight.finding import Finding, Severity, Trap
from slime_spec.suggest import did_you_mean

logger = logging.getLogger(__name__)
THEIR_FLAGS = ("--sglang-", "--no-sglang-", "--speculative-", "--no-speculative-")
REFUSED = "configuration"  # the id of what is refused without being a trap
OUR_FLAGS = ("--sglang-weight-transport",)
ORDER = (Severity.ERROR, Severity.WARNING, Severity.INFO)


def examine(engines: Sequence[Facts]) -> list[Finding]:
    """Return every check's finding, errors first; a trap is reported once, for the first engine that runs into it."""
    found = [finding for each in TRAPS if (finding := _first(each, engines)) is not None]
    return sorted(found, key=lambda finding: ORDER.index(finding.severity))


def _first(trap: Trap, engines: Sequence[Facts]) -> Finding | None:
    for facts in engines:
        finding = trap(facts)
        if finding is None:
            continue
        if facts.config.sglang_server.external_addrs:
            return _of_external(finding, facts)
        return finding if facts is engines[0] else _of_one_engine(finding, facts.engine)
    return None


def _of_one_engine(finding: Finding, engine: int) -> Finding:
    """Return the finding about one engine: a flag for all engines does not reach what --sglang-config sets for one."""
    return replace(
        finding,
        read=f"engine {engine}: {finding.read}",
        remedy=f"In the file of --sglang-config, for engine {engine}: {finding.remedy}",
        fix=(),
    )


def _of_external(finding: Finding, facts: Facts) -> Finding:
    """Return the finding about an external server's flags, with a remedy for the place where the server is started."""
    is_theirs = any(word.startswith(THEIR_FLAGS) and word not in OUR_FLAGS for word in finding.fix)
    if not is_theirs:
        return finding
    address = facts.config.sglang_server.external_addrs[facts.engine]
    return replace(
        finding,
        read=f"{address}: {finding.read}",
        remedy=f"Where {address} is started (without the prefix --sglang-): {finding.remedy}",
        fix=(),
    )


def log_findings(findings: Sequence[Finding], skipped: Sequence[str]) -> None:
    """Log what does not stop a launch and is more than good to know, a line each."""
    stopping = not_skipped(findings, skipped)
    for finding in findings:
        if finding.severity is not Severity.INFO and finding not in stopping:
            logger.warning("preflight found check=%s: %s. %s", finding.id, finding.read, finding.remedy)


def refused(error: ConfigError) -> Finding:
    """Return a configuration, or an input that it names, that is refused as a finding, which cannot be skipped."""
    return Finding(
        id=REFUSED,
        severity=Severity.ERROR,
        read=f"{error.setting} = {error.value!r}: {error.rule}",
        why="Nothing starts with a configuration that is refused, or with an input that cannot be read.",
        remedy=error.remedy.strip(),
        fix=(),
        links=(),
    )


def not_skipped(findings: Sequence[Finding], skipped: Sequence[str]) -> list[Finding]:
    """Return the errors that stop a launch."""
    return [each for each in findings if each.severity is Severity.ERROR and each.id not in skipped]


def refusal(errors: Sequence[Finding]) -> ConfigError:
    """Return one error for all findings that stop a launch."""
    traps = [each.id for each in errors if each.id != REFUSED]
    risk = f"; --skip-check {' '.join(traps)} takes the risk" if traps else ""
    return ConfigError(
        "preflight",
        "".join(f"\n    {each.id}: {each.read}" for each in errors),
        [each.id for each in errors],
        "".join(f"\n    {each.id}: {each.remedy}" for each in errors)
        + f"\n    `slime-spec doctor` with the same flags explains{risk}.",
    )


def check_skipped(ids: Sequence[str]) -> None:
    known = [each.id for each in TRAPS]
    for name in ids:
        if name not in known:
            raise ConfigError(
                "run.skip_checks",
                "must name checks of `slime-spec doctor`",
                name,
                f"{did_you_mean(name, known)}Known: {', '.join(known)}.",
            )
