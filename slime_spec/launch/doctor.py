"""The command ``slime-spec doctor [flags of train] [--slime SCRIPT] [--metrics RUN] [--json] [--fix]`` checks a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from slime_spec.errors import ConfigError, each_of, raise_all
from slime_spec.launch.compose import composed
from slime_spec.preflight import report
from slime_spec.preflight.facts import Facts
from slime_spec.preflight.finding import Finding
from slime_spec.preflight.finished_run import acceptance_by_position
from slime_spec.preflight.gate import ORDER, refused

USAGE = """\
slime-spec doctor [flags of train] [--slime SCRIPT] [--metrics RUN] [--json] [--fix]

  Makes the checks of a launch without starting anything: it reads every file that the run reads (checkpoints,
  prompts, rewards), looks for every trap of speculative rollouts that is known to this version, asks SGLang's
  interpreter (--sglang-python) for its version and the driver for this machine's GPUs.

  --slime SCRIPT   judge what a launch script of slime's would run, on slime: its servers, drafts and prompts, and what
                   slime itself does with a draft; nothing of the script is run. Flags of train beside it win
  --metrics RUN    also judge the acceptance of a finished run (its folder or metrics.jsonl) by draft position;
                   without flags of train the run is checked as it ran
  --json           findings as JSON
  --fix            only the flags that mend what was found, to append to the command

Exit code: 2 with an error (which stops a launch), 1 with a warning, else 0; --skip-check ID leaves a check out of it,
and of what stops a launch."""
CONFIG = "config.yaml"  # file of a run's folder


@dataclass(frozen=True)
class Options:
    """Holds the command's own flags, and the flags of train."""

    metrics: Path | None
    slime: Path | None
    as_json: bool
    as_fix: bool
    train: tuple[str, ...]


@dataclass(frozen=True)
class Examined:
    """Holds findings, and the lines of the memory table.

    ``sglang`` is the version judged, None without a planned server or a valid configuration.
    """

    findings: list[Finding]
    judged: str
    sglang: str | None
    skipped: tuple[str, ...]
    memory: tuple[str, ...] = ()


def run_doctor(argv: Sequence[str], show: Callable[[str], None]) -> int:
    """Run the doctor and return its exit code; a configuration that does not compose is itself a finding."""
    if {"-h", "--help"} & set(argv):
        show(USAGE)
        return 0
    options = _options(argv)
    examined = _examine(options)
    if options.as_json:
        show(report.as_json(examined.findings, examined.sglang, examined.skipped))
    elif options.as_fix:
        show(report.as_flags(examined.findings))
    else:
        text = report.as_text(examined.findings, examined.judged, examined.skipped)
        console = Console(width=report.width(), highlight=False)
        console.print(text)
        for line in examined.memory:
            console.print(line, markup=False, soft_wrap=True)
    return report.exit_code(each for each in examined.findings if each.id not in examined.skipped)


def _examine(options: Options) -> Examined:
    if options.slime is not None:
        return _examine_slime(options, options.slime)
    acceptance = acceptance_by_position(options.metrics) if options.metrics is not None else ()
    try:
        made = composed(options.train)
        from slime_spec.launch.preflight import look  # which imports torch: a typing mistake is told without it

        looked = look(made, acceptance)
        looked.close()
    except ConfigError as error:
        return Examined([refused(each) for each in each_of(error)], "a configuration that is refused", None, ())
    config = made.config
    if not looked.engines:
        return Examined([*looked.findings], "a configuration that is refused", None, ())
    first = looked.engines[0]
    judged = f"a run on SGLang {first.release.text}" if first.on_sglang else f"a run on {config.rollout.engine} engines"
    if first.on_sglang and not first.release.is_installed:
        judged += " (the pinned version; none is installed)"
    sglang = first.release.text if first.on_sglang else None
    return Examined([*looked.findings], judged, sglang, config.run.skip_checks, _memory(first))


def _examine_slime(options: Options, script: Path) -> Examined:
    """Examine slime's own launch: what cannot be composed here is no mistake of slime's."""
    from slime_spec.launch.slime.doctor import not_judged, of_slime, read_launch, slimes_own

    acceptance = acceptance_by_position(options.metrics) if options.metrics is not None else ()
    try:
        launch = read_launch(script, os.environ, options.train)
    except ConfigError as error:
        return Examined([refused(each) for each in each_of(error)], "a script that cannot be read", None, ())
    try:
        made = composed(launch.train)
        from slime_spec.launch.preflight import look

        looked = look(made, acceptance)
        looked.close()
        if not looked.engines:
            raise_all(looked.refusals)
    except ConfigError as error:
        judged = "slime's launch, of which no facts are known"
        return Examined([*slimes_own(launch, None), *not_judged(error)], judged, None, ())
    first = looked.engines[0] if looked.engines else None
    sglang = first.release.text if first is not None and first.on_sglang else None
    judged = f"slime's launch on SGLang {sglang}" if sglang else "slime's launch"
    findings = sorted(
        [*of_slime(looked.findings), *slimes_own(launch, first)], key=lambda each: ORDER.index(each.severity)
    )
    return Examined(findings, judged, sglang, made.config.run.skip_checks)


def _memory(facts: Facts) -> tuple[str, ...]:
    """Return the table of what GPUs hold, where all fit: what does not is a finding with its table."""
    from slime_spec.preflight.gpu_memory import plan_gpus
    from slime_spec.preflight.memory import plan_memory
    from slime_spec.preflight.memory_table import table_lines

    gpus = plan_gpus(facts, plan_memory(facts))
    return () if any(each.overfull for each in gpus) else ("", *table_lines(gpus))


def _options(argv: Sequence[str]) -> Options:
    named: dict[str, Path | None] = {"--metrics": None, "--slime": None}
    needs = {"--metrics": ("a run's folder or metrics.jsonl", "runs/NAME"), "--slime": ("a launch script", "run.sh")}
    train: list[str] = []
    words = iter(argv)
    for word in words:
        name, _, value = word.partition("=")
        if name in named:
            path = value or next(words, None)
            if path is None:
                what, example = needs[name]
                raise ConfigError(name, f"needs {what}", None, f"Pass {name} {example}.")
            named[name] = Path(path)
        elif word not in ("--json", "--fix"):
            train.append(word)
    metrics, slime = named["--metrics"], named["--slime"]
    if metrics is not None and slime is None and not train:
        train = _as_it_ran(metrics)
    return Options(metrics, slime, "--json" in argv, "--fix" in argv, tuple(train))


def _as_it_ran(metrics: Path) -> list[str]:
    """Return the flags of the run with these metrics, if its folder has them."""
    settings = (metrics if metrics.is_dir() else metrics.parent) / CONFIG
    return ["--config", str(settings)] if settings.is_file() else []
