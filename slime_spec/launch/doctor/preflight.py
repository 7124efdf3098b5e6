"""All checks on one configuration, and the gate before a launch: errors stop it, warnings are logged once."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from slime_spec.config.suggest import did_you_mean
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.launch.doctor.checks import TRAPS
from slime_spec.launch.doctor.facts import Facts, gather
from slime_spec.launch.doctor.finding import Finding, Severity

logger = logging.getLogger(__name__)
ORDER = (Severity.ERROR, Severity.WARNING, Severity.INFO)


def examine(facts: Facts) -> list[Finding]:
    """What every check finds, errors first."""
    found = [finding for each in TRAPS if (finding := each(facts)) is not None]
    return sorted(found, key=lambda finding: ORDER.index(finding.severity))


def check_launch(config: Config, argv: Sequence[str]) -> None:
    """Raise ConfigError naming every error that ``run.skip_checks`` does not; log the rest once.

    Nothing has started yet: this reads files and asks an interpreter for a version.
    """
    check_skipped(config.run.skip_checks)
    findings = examine(gather(config, argv))
    errors = [each for each in findings if each.severity is Severity.ERROR]
    stopping = [each for each in errors if each.id not in config.run.skip_checks]
    for finding in findings:
        if finding.severity is Severity.WARNING or (finding in errors and finding not in stopping):
            logger.warning("preflight found check=%s: %s. %s", finding.id, finding.read, finding.remedy)
    if stopping:
        raise refusal(stopping)


def refusal(errors: Sequence[Finding]) -> ConfigError:
    """One error for all findings that stop a launch."""
    remedies = "".join(f"\n    {each.id}: {each.remedy}" for each in errors)
    return ConfigError(
        "preflight",
        "; ".join(f"{each.id}: {each.read}" for each in errors),
        [each.id for each in errors],
        f"{remedies}\n    `slime-spec doctor` with the same flags explains each; --skip-check "
        f"{' '.join(each.id for each in errors)} launches all the same.",
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
