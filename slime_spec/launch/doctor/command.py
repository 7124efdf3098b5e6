"""``slime-spec doctor [flags of train] [--metrics RUN] [--json] [--fix]``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from slime_spec.errors import ConfigError
from slime_spec.launch.compose import compose
from slime_spec.launch.doctor import report
from slime_spec.launch.doctor.facts import gather
from slime_spec.launch.doctor.finding import Finding, Severity
from slime_spec.launch.doctor.finished_run import acceptance_by_position
from slime_spec.launch.doctor.preflight import check_skipped, examine
from slime_spec.launch.doctor.release import Release

USAGE = """\
slime-spec doctor [flags of train] [--metrics RUN] [--json] [--fix]

  Checks a configuration against every trap of speculative rollouts that is known to this version, without starting
  anything: it reads config.json and headers of the checkpoints and the version of SGLang (--sglang-python).

  --metrics RUN    also judge the acceptance of a finished run (its folder or metrics.jsonl) by draft position
  --json           findings as JSON
  --fix            only the flags that mend what was found, to append to the command

Exit code: 2 with an error (which stops a launch on the sglang engine, see --skip-check), 1 with a warning, else 0."""


@dataclass(frozen=True)
class Options:
    """The command's own flags, and those of train."""

    metrics: Path | None
    as_json: bool
    as_fix: bool
    train: tuple[str, ...]


def run_doctor(argv: Sequence[str], show: Callable[[str], None]) -> int:
    """Returns the exit code; a configuration that does not compose is itself a finding."""
    if {"-h", "--help"} & set(argv):
        show(USAGE)
        return 0
    options = _options(argv)
    findings, release = _findings(options)
    if options.as_json:
        show(report.as_json(findings, release.text if release else None))
    elif options.as_fix:
        show(report.as_flags(findings))
    else:
        Console(width=report.width(), highlight=False).print(report.as_table(findings, _judged(release)))
    return report.exit_code(findings)


def _findings(options: Options) -> tuple[list[Finding], Release | None]:
    acceptance = acceptance_by_position(options.metrics) if options.metrics is not None else ()
    try:
        config = compose(options.train)
        check_skipped(config.run.skip_checks)
        facts = gather(config, options.train, acceptance)
    except ConfigError as error:
        return [_refused(error)], None
    return examine(facts), facts.release


def _refused(error: ConfigError) -> Finding:
    return Finding(
        id="configuration",
        severity=Severity.ERROR,
        read=f"{error.setting} = {error.value!r}: {error.rule}",
        why="Nothing starts with a configuration that is refused; the other checks need one.",
        remedy=error.remedy.strip(),
        fix=(),
        links=(),
    )


def _judged(release: Release | None) -> str:
    if release is None:
        return "a configuration that is refused"
    return f"SGLang {release.text}" + ("" if release.is_installed else " (pinned; none is installed)")


def _options(argv: Sequence[str]) -> Options:
    metrics: Path | None = None
    train: list[str] = []
    words = iter(argv)
    for word in words:
        name, _, value = word.partition("=")
        if name == "--metrics":
            path = value or next(words, None)
            if path is None:
                raise ConfigError(
                    "--metrics", "needs a run's folder or metrics.jsonl", None, "Pass --metrics runs/NAME."
                )
            metrics = Path(path)
        elif word not in ("--json", "--fix"):
            train.append(word)
    return Options(metrics, "--json" in argv, "--fix" in argv, tuple(train))
