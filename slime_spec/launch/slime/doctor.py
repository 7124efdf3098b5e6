"""The doctor judges slime's own launch: what its servers run into, and what slime itself does with drafts.

Of slime's script the flags that this project knows make facts, and the checks of servers, drafts and prompts hold for
slime as they do here. Checks of this project's own trainer, engines and pushes say nothing of slime; what slime does in
their place is judged here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slime_spec.config.yaml_file import read_yaml_file
from slime_spec.errors import ConfigError, each_of
from slime_spec.integrations.settings import BLOCK, REMEDY, VARIABLE, read_block
from slime_spec.launch.arguments import read_each
from slime_spec.launch.port.ported import Fate, Row, port
from slime_spec.launch.port.script import read_script
from slime_spec.launch.port.text import open_parts, shown
from slime_spec.preflight.facts import Facts
from slime_spec.preflight.finding import Finding, Severity
from slime_spec.preflight.gate import refused
from slime_spec.sglang.metadata import ACCEPT_TOKENS

HOOKS = "slime_spec.integrations.slime"
GENERATE, LOG, BLOCKS = "--custom-generate-function-path", "--custom-rollout-log-function-path", "--custom-config-path"
OF_FRAMEWORKS, PLUG_IN = "docs/plug-in-frameworks.md", "docs/plug-in.md"
HEARING = (f"{HOOKS}.generate", f"{HOOKS}.generate_embedded")  # they read every release's counters
# Checks of what this project's own trainer, engines and pushes do.
OF_THIS_PROJECT = frozenset(
    {
        *("trainer-architecture", "engine-architecture", "speculation-control", "metadata-keys", "draft-overwritten"),
        *("disk-reduced-vocabulary", "draft-refresh", "torch-versions", "push-quantization", "engine-memory"),
        *("gpus", "gpu-memory"),
    }
)


@dataclass(frozen=True)
class SlimeLaunch:
    """Holds slime's launch: ``train`` are the words of `slime-spec train` that it is equivalent to, as far as it is.

    ``flags`` are slime's own words by flag, and over them the settings of --custom-config-path's file, as slime has it;
    ``unknown`` what this project has no equivalent of. ``plugin_file`` is what SLIME_SPEC_PLUGIN names.
    """

    train: tuple[str, ...]
    flags: Mapping[str, tuple[str, ...]]
    unknown: tuple[Row, ...]
    plugin_file: str | None = None

    def value(self, flag: str) -> str | None:
        """Return the one value of a flag; None where it is absent, or only a shell can know it."""
        words = self.flags.get(flag, ())
        return words[0] if len(words) == 1 and not open_parts(words[0]) else None


def read_launch(script: Path, environment: Mapping[str, str], extra: Sequence[str]) -> SlimeLaunch:
    """Read a launch script of slime's, without running it; ``extra`` are flags of this project's, which win."""
    launch = read_script(script, environment)
    ported = port(launch, extra)
    flags = {reading.name: tuple(reading.words[1:]) for reading in read_each(launch.words)}
    unknown = tuple(row for row in ported.rows if row.fate is Fate.MISSING)
    made = SlimeLaunch(tuple(shown(word) for word in ported.words), flags, unknown, environment.get(VARIABLE))
    return replace(made, flags=_overlaid(flags, made.value(BLOCKS)))


def _overlaid(flags: Mapping[str, tuple[str, ...]], path: str | None) -> Mapping[str, tuple[str, ...]]:
    """Return the flags with those of slime's YAML file over them; a file that cannot be read is told of later."""
    try:
        settings = {} if path is None else read_yaml_file(Path(path), REMEDY)
    except ConfigError:
        return flags
    made = dict(flags)
    for name, value in settings.items():
        flag = f"--{str(name).replace('_', '-')}"
        if value is None or value is False:
            made.pop(flag, None)
        elif name != BLOCK:
            values = value if isinstance(value, list) else () if value is True else (value,)
            made[flag] = tuple(map(str, values))
    return made


def of_slime(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings that hold for slime, too."""
    return [each for each in findings if each.id not in OF_THIS_PROJECT]


def not_judged(error: ConfigError) -> list[Finding]:
    """Return what this project refuses of the launch, which slime may do: nothing that depends on it was judged."""
    return [
        Finding(
            id="not-judged",
            severity=Severity.WARNING,
            read=f"{each.setting} = {each.value!r}: {each.rule}",
            why="A launch that cannot be composed here gives no facts to judge by; slime itself may well run it.",
            remedy=f"To have it judged: {each.remedy.strip()}",
            fix=(),
            links=(OF_FRAMEWORKS,),
        )
        for each in each_of(error)
    ]


def slimes_own(launch: SlimeLaunch, facts: Facts | None) -> list[Finding]:
    """Return what slime itself does with drafts and their acceptance; ``facts`` of its servers, None if not known."""
    found = [finding for look in LOOKS if facts is not None and (finding := look(launch, facts)) is not None]
    return [*found, *_block(launch), *_unknown(launch)]


def _draft_sync(launch: SlimeLaunch, facts: Facts) -> Finding | None:
    """Say what slime's update of weights does to a draft: it names no side, and opens no session."""
    record, contract = facts.config.speculative.record, facts.release.weight_contract
    if not (facts.speculates and record.has_weights):
        return None
    transport = "tensor" if "--colocate" in launch.flags else "distributed"
    if contract.style == "selector":
        read = f"SGLang {facts.release.text} refuses slime's updates, which open no session (400)"
    elif transport in contract.reaches_draft and facts.draft_kind in ("head", "whole"):
        read = f"SGLang {facts.release.text} loads the target's tensors of slime's updates into the draft, too"
    else:
        return None
    return Finding(
        id="slime-draft-sync",
        severity=Severity.WARNING,
        read=f"{read}; whether its plug-in is installed where the servers run is not known here",
        why="slime says of no update whether it is for the target or the draft. A draft that is overwritten is hardly "
        "ever accepted, and no output shows it.",
        remedy="pip install slime_spec in the servers' environment: SGLang finds its plug-in, which keeps updates off "
        "the draft.",
        fix=(),
        links=(PLUG_IN,),
    )


def _metadata(launch: SlimeLaunch, facts: Facts) -> Finding | None:
    """Say where slime's own acceptance would be 0.0, by the names that the servers' release writes."""
    function = launch.value(GENERATE)
    is_heard = function in HEARING if function is not None else GENERATE in launch.flags
    if not facts.speculates or facts.release.metadata == ACCEPT_TOKENS or is_heard:
        return None
    of_user = f", and name {function} as `generate` in its block {BLOCK}" if function is not None else ""
    return Finding(
        id="slime-metadata",
        severity=Severity.WARNING,
        read=f"SGLang {facts.release.text} writes {facts.release.metadata.correct}, and slime reads "
        f"{ACCEPT_TOKENS.correct}",
        why="slime logs an acceptance of 0.0 where the counters have other names, as if no draft were ever right.",
        remedy=f"Pass {GENERATE} {HOOKS}.generate, which reads every release's names{of_user}.",
        fix=() if function is not None else (GENERATE, f"{HOOKS}.generate"),
        links=(OF_FRAMEWORKS,),
    )


def _pooling(launch: SlimeLaunch, facts: Facts) -> Finding | None:
    if not facts.speculates or LOG in launch.flags:
        return None
    return Finding(
        id="slime-acceptance",
        severity=Severity.INFO,
        read="slime logs the mean of its samples' ratios, with zeros for samples without a round",
        why="A mean of ratios weighs a sample of three rounds as one of three hundred; what is saved, the sums say.",
        remedy=f"Pass {LOG} {HOOKS}.log_rollout for pooled acceptance, by position and version, with the net speed-up.",
        fix=(LOG, f"{HOOKS}.log_rollout"),
        links=(OF_FRAMEWORKS,),
    )


LOOKS: tuple[Callable[[SlimeLaunch, Facts], Finding | None], ...] = (_draft_sync, _metadata, _pooling)


def _block(launch: SlimeLaunch) -> Iterator[Finding]:
    """Yield the mistakes in the plug-in's block: of the file that slime reads, else of the plug-in's own."""
    try:
        for named in (launch.value(BLOCKS), launch.plugin_file):
            block = None if not named else read_yaml_file(Path(named), REMEDY).get(BLOCK)
            if block is not None:
                read_block(block)
                return
    except ConfigError as error:
        yield from map(refused, each_of(error))


def _unknown(launch: SlimeLaunch) -> Iterator[Finding]:
    """Yield what the script says and this project has no equivalent of: nobody here knows what it does."""
    if launch.unknown:
        yield Finding(
            id="slime-flags",
            severity=Severity.INFO,
            read="; ".join(f"{row.flag}: {row.why}" for row in launch.unknown),
            why="What this project does not do itself gives no facts: these flags were left out of what was judged.",
            remedy="Nothing to do where slime does it.",
            fix=(),
            links=("docs/coming-from-slime.md",),
        )
