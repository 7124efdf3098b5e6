"""Turn the words of a slime launch into the words of this project's, each flag with what became of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from slime_spec.errors import ConfigError, each_of
from slime_spec.launch.arguments import EXTRA_ARGS, Reading, read_each
from slime_spec.launch.compose import composed
from slime_spec.launch.flags import IS_NO_FLAG
from slime_spec.launch.help import DRY_RUN
from slime_spec.launch.port.script import Launch
from slime_spec.launch.port.text import open_parts, shown
from slime_spec.launch.slime.model_shape import NAMES, check_model_shape
from slime_spec.launch.slime.notes import reason_of
from slime_spec.launch.slime.reference import REASON, REF_LOAD, is_converted
from slime_spec.launch.slime.together import MADE_BY, MEANINGS
from slime_spec.launch.slime.without_effect import WANDB_KEY

BASE = ("--config", "slime")  # slime's defaults
ASYNC = "train_async.py"
AFTER = "--on-cpu or flags after -- say it"
CHECKPOINT = "model.hf_checkpoint"
# One embedded engine and one trainer rank on the machine's cores, in place of what a script says about GPUs.
ON_CPU = (
    *("--rollout-engine", "embedded", "--rollout-num-engines", "1", "--rollout-num-gpus-per-engine", "0"),
    *("--actor-num-gpus", "0", "--actor-world-size", "1", "--colocate"),
    *("--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1", "--context-parallel-size", "1"),
    *("--expert-model-parallel-size", "1", "--expert-tensor-parallel-size", "1"),
)
UNKNOWN = "is not known here"
# Flags of the same name whose files are of another form.
OTHER_FILES: Mapping[str, tuple[str, str]] = {
    "--sglang-config": (
        "slime's file describes groups of servers, this project's the flags of single engines",
        "Write {0: {mem_fraction_static: 0.7}} for each engine that differs.",
    ),
}
RUN_NAME, NAME = "--run-name", re.compile(r"\w[\w.-]*")


class Fate(StrEnum):
    """Says what became of a flag."""

    SAME = "same"
    MAPPED = "mapped"
    ADDED = "added"
    IGNORED = "no effect"
    MISSING = "missing"


@dataclass(frozen=True)
class Row:
    """Holds a flag as the script has it, what became of it, and why."""

    fate: Fate
    flag: str
    why: str


@dataclass(frozen=True)
class Ported:
    """Holds the flags of `slime-spec train`, each with its values, and a row for each flag of the script.

    Words may have open parts (slime_spec.launch.port.text).
    """

    flags: tuple[tuple[str, ...], ...]
    rows: tuple[Row, ...]
    not_followed: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        return [word for flag in self.flags for word in flag]

    @property
    def missing(self) -> list[Row]:
        return [row for row in self.rows if row.fate is Fate.MISSING]

    @property
    def is_open(self) -> bool:
        """Return whether only a shell can fill in the words."""
        return any(map(open_parts, self.words))

    @property
    def unset(self) -> list[str]:
        """Return the variables that somebody must set, in order."""
        names = [source[2:-1] for word in self.words for source in open_parts(word) if source.startswith("${")]
        return list(dict.fromkeys(name for name in names if name.isidentifier()))


def port(launch: Launch, extra: Sequence[str] = ()) -> Ported:
    """Return what a launch is here; ``extra`` are flags of this project that come last, and win."""
    flags: list[tuple[str, ...]] = [BASE]
    rows: list[Row] = []
    if launch.program == ASYNC:
        why = "each step generates, trains and pushes in turn: no sample is older than its weights"
        rows.append(Row(Fate.IGNORED, ASYNC, why))
    readings, own = list(read_each(launch.words)), list(read_each(extra))
    said = _said(own)
    for reading in readings:
        row = Row(Fate.IGNORED, " ".join(map(shown, reading.words)), AFTER) if said(reading) else _row(reading)
        rows.append(row)
        if row.fate in (Fate.SAME, Fate.MAPPED) and reading.path != WANDB_KEY:
            flags.append(reading.words)
    name = launch.files[0].stem
    if NAME.fullmatch(name) and not {"run.name", "run.output_dir"} & {each.path for each in (*readings, *own)}:
        flags.append((RUN_NAME, name))
        rows.append(
            Row(Fate.ADDED, f"{RUN_NAME} {name}", "the script's: runs of other scripts have folders of their own")
        )
    flags += [reading.words for reading in own]
    shape = {each.path: each.value for each in readings if each.path in NAMES}
    if any(each.path == CHECKPOINT for each in own):
        shape = {}  # the script's shape is that of its own checkpoint
    rows += _contradictions([shown(word) for flag in flags for word in flag if word != DRY_RUN], shape)
    return Ported(tuple(flags), tuple(rows), tuple(launch.not_followed))


def _said(own: Sequence[Reading]) -> Callable[[Reading], bool]:
    """Return what tells whether a flag of the script sets what ``own`` flags set, which then leave it out.

    A flag of the script that is wrong has no path, and is known by its name. A list that grows flag by flag is kept.
    """
    paths = {each.path for each in own} - {"", EXTRA_ARGS}
    names = {each.name.replace("_", "-") for each in own} | {flag for path in paths for flag in MADE_BY.get(path, ())}

    def is_said(reading: Reading) -> bool:
        if reading.path == EXTRA_ARGS:
            return False
        return reading.path in paths or reading.name.replace("_", "-") in names

    return is_said


def _row(reading: Reading) -> Row:
    flag = " ".join(map(shown, reading.words))
    sources = [source for word in reading.words[1:] for source in open_parts(word)]
    if reading.path == WANDB_KEY:
        return Row(Fate.MAPPED, WANDB_KEY, "set WANDB_API_KEY in the environment")
    if reason := reason_of(reading.path):
        return Row(Fate.IGNORED, flag, reason)
    if reading.name == REF_LOAD and reading.error is None and is_converted(reading.value):
        return Row(Fate.IGNORED, flag, REASON)
    if reading.name in OTHER_FILES:
        return Row(Fate.MISSING, flag, "; ".join(OTHER_FILES[reading.name]))
    if reading.error is not None and sources:
        return Row(Fate.MISSING, flag, f"{sources[0]} is not known: set it in the environment of slime-spec port")
    if reading.error is not None:
        rule, remedy = reading.error.rule, reading.error.remedy
        return Row(Fate.MISSING, flag, UNKNOWN if rule == IS_NO_FLAG else f"{rule}; {remedy}")
    if reading.name in MEANINGS:
        return Row(Fate.MAPPED, flag, MEANINGS[reading.name])
    return Row(Fate.SAME, flag, reading.path)


def _contradictions(words: Sequence[str], shape: Mapping[str, Sequence[str]]) -> Iterator[Row]:
    """Yield a row for everything that the flags together are refused for, or that a checkpoint's shape contradicts."""
    try:
        checkpoint = composed(words).config.model.hf_checkpoint
        check_model_shape(shape, checkpoint)
    except ConfigError as error:
        for each in each_of(error):
            yield Row(Fate.MISSING, each.setting, f"{each.rule} (got {each.value!r}); {each.remedy}")
