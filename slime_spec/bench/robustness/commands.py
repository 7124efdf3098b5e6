"""Random command lines and configuration files go through all that a launch does before it starts a process."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from random import Random

from slime_spec.algorithms import HISTORY, LOOKUP
from slime_spec.bench.robustness.fuzzer import Case, Kind
from slime_spec.bench.robustness.tiny import make_target
from slime_spec.bench.robustness.yaml_texts import yaml_text
from slime_spec.checkpoints.families.llama import LLAMA
from slime_spec.config.schema import Setting, settings
from slime_spec.config.tree import ModelConfig
from slime_spec.launch.compose import composed
from slime_spec.launch.flags import REFUSED, flags
from slime_spec.launch.groups import GROUPS, choices
from slime_spec.launch.preflight import look
from slime_spec.sglang.flags import sglang_flags

NUMBERS = (
    *("0", "1", "-1", "2", "3", "7", "64", "1.5", "0.5", "-0.0", "1e-6", "1E3", "1e39", "1e300", "1e400", "-1e999"),
    *(
        "nan",
        "inf",
        "-inf",
        "NaN",
        "Infinity",
        ".inf",
        ".nan",
        "1_000",
        "0x10",
        "0o17",
        "010",
        "1e",
        "8k",
        "8Ki",
        "9Ti",
    ),
    *("9" * 30, "9" * 5000, "1" + "0" * 400 + ".5", "٣", "１", "½", "1,000", "1.", ".5", "+3", "--3", "5e-324"),
)
TEXTS = (
    *("", " ", "null", "None", "~", "true", "false", "on", "off", "yes", "NO", "[]", "{}", "[1,2]", "[a,b", "{a:1}"),
    *("'", '"', "'x'", '"null"', "a=b", "=", "==", "a.b=c", "--", "-", "---", "\t", "\n", "a\nb", "\x00", "\x1b[31m"),
    *("é", "日本語", "🙂", "\ud800", "\udcff", "\ufeff", "\u202e", "a" * 5000, "/", "//", "/nowhere", "../..", "~/x"),
    *("${model.hf_checkpoint}", "${", "${oc.env:HOME}", "$(id)", "%s", "{rollout_id}", "{0}", "{", "x:y", ":", "a:b:c"),
    *(
        "127.0.0.1:1",
        "[::1]:80",
        "host:99999",
        "host:-1",
        "host:x",
        "http://h:1",
        "builtin:",
        "builtin:nothing",
        "[[[[",
    ),
    *("[1,[2,[3]]]", "[" * 200, "[" * 2000 + "]" * 2000, "2024-01-31", "2024-13-45", "0000-00-00", "1:2:3", "!!python"),
)
SOUND: tuple[tuple[str, ...], ...] = (
    *((), (), (), ("--config", "tiny"), ("--debug-rollout-only",), ("--speculative-algorithm", HISTORY.name)),
    *(("--speculative-algorithm", LOOKUP.name), ("--rollout-engine", "sglang", "--skip-check", "sglang-version")),
    ("--rollout-engine", "sglang", "--rollout-external-engine-addrs", "127.0.0.1:9"),
)
SPELLINGS: tuple[Callable[[str], str], ...] = (
    str,
    str,
    str,
    str.upper,
    lambda name: name.replace("-", "_"),
    lambda name: name.replace("--", "--no-", 1),
    lambda name: name.replace("--", "--sglang-", 1),
    lambda name: name[:-1],
    lambda name: name + "s",
    lambda name: name.replace("--", "-", 1),
    lambda name: f"{name}=",
)


@dataclass(frozen=True)
class Command:
    """Holds a command line, the file that it names, and whether the checkpoint is the one that the line names."""

    words: list[str]
    text: bytes | None
    is_own_checkpoint: bool = False


class Commands:
    """Fuzzes command lines; every fourth one also names a configuration file.

    What composes goes on through the preflight, most often with a small checkpoint that is whole, so that all of the
    preflight is reached in little time.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "mine.yaml"
        self._checkpoint = str(make_target(folder / "target", LLAMA, max_position_embeddings=2**16))
        self._flags = [*flags(), *REFUSED]
        self._paths = [*settings(), *(flag.path for flag in sglang_flags().values())]
        self._settings: Mapping[str, Setting] = settings()
        # Once for what takes its time once in a process: importing torch and transformers.
        assert self.attempt(Case("no flags", Command([], None))), "the defaults are accepted"

    def make(self, random: Random) -> Case[Command]:
        words = [word for _ in range(random.choice((0, 1, 1, 2, 3, 5, 8))) for word in self._words(random)]
        words[:0] = random.choice(SOUND)
        text = yaml_text(random) if random.random() < 0.25 else None
        if text is not None:
            words[:0] = ["--config", str(self._file)]
        told = f"; its file: {text[:300]!r}" if text is not None else ""
        what = shlex.join(words).replace(str(self._file), self._file.name)
        return Case(f"{what[:600]!a}{told}", Command(words, text, random.random() < 0.2))

    def attempt(self, case: Case[Command]) -> bool:
        command = case.value
        if command.text is not None:
            self._file.write_bytes(command.text)
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            made = composed(command.words)
            model = made.config.model
            if not command.is_own_checkpoint or model == ModelConfig():
                model = replace(model, hf_checkpoint=self._checkpoint)
            looked = look(replace(made, config=replace(made.config, model=model)))
            looked.close()
        return not looked.stopping

    def close(self) -> None:
        pass

    def _words(self, random: Random) -> list[str]:
        """Make the words of one setting: a flag with values, path=value, group=name, or no setting at all."""
        shape = random.random()
        if shape < 0.4:
            name = random.choice(SPELLINGS if random.random() < 0.3 else (str,))(random.choice(self._flags))
            path = flags()[name].path if name in flags() else ""
            values = [self._value(random, path) for _ in range(random.choice((0, 1, 1, 1, 1, 2, 3)))]
            return [f"{name}={values[0]}"] if values and random.random() < 0.3 else [name, *values]
        if shape < 0.8:
            path = random.choice(self._paths)
            value = self._value(random, path)
            if random.random() < 0.1:
                path = random.choice((path.upper(), path + ".x", "+" + path, "~" + path, path[:-1], path.split(".")[0]))
            return [f"{path}={value}"]
        if shape < 0.9:
            group = random.choice(GROUPS)
            return [f"{group}={random.choice((*choices(group), *TEXTS[:12]))}"]
        return [random.choice(TEXTS + NUMBERS)]

    def _value(self, random: Random, path: str) -> str:
        """Make the text of a value: often one that the setting takes, else anything."""
        setting = self._settings.get(path)
        if setting is None or random.random() < 0.5:
            return random.choice(TEXTS + NUMBERS)
        if setting.choices:
            return random.choice(setting.choices)
        if setting.type is str:
            return str(setting.default)
        return random.choice(NUMBERS[:14] if setting.type in (int, float) else ("true", "false"))


measure = Kind("commands", "command lines, every fourth with a configuration file", 5_000, Commands).measure
