"""Damaged checkpoint folders go through a launch's checks and the model's load: one error each, or loaded right."""

from __future__ import annotations

from pathlib import Path
from random import Random

from slime_spec.bench.robustness.damage import Damage, Files, damage
from slime_spec.bench.robustness.fuzzer import Case, Kind
from slime_spec.bench.robustness.launched import Scratch, config_of, files_of, launched
from slime_spec.bench.robustness.tiny import add_older_files, make_target
from slime_spec.checkpoints.families.llama import LLAMA
from slime_spec.checkpoints.families.mimo import MIMO
from slime_spec.checkpoints.families.qwen2 import QWEN2
from slime_spec.checkpoints.families.qwen3 import QWEN3
from slime_spec.checkpoints.folder import ANY_FAMILY

KEYS = sorted({*ANY_FAMILY, *QWEN3.keys, *MIMO.keys, "text_config"})


class Checkpoints:
    """Fuzzes targets: every family, in one file of weights and in two with an index."""

    def __init__(self, folder: Path) -> None:
        self._scratch = Scratch(folder / "damaged")
        made = {
            "llama": make_target(folder / "llama", LLAMA),
            "llama, tied": add_older_files(make_target(folder / "tied", LLAMA, tie_word_embeddings=True)),
            "qwen2 in two files": make_target(folder / "qwen2", QWEN2, is_sharded=True),
            "qwen3": make_target(folder / "qwen3", QWEN3),
            "mimo in two files": make_target(folder / "mimo", MIMO, is_sharded=True),
        }
        self.files = {name: files_of(path) for name, path in made.items()}
        # Whole, for what takes its time once in a process: importing transformers, loading the kernels.
        assert launched(config_of(made["llama"])) is not None, "a whole checkpoint is accepted"

    def make(self, random: Random) -> Case[tuple[Files, Damage]]:
        name = random.choice([*self.files])
        found = damage(self.files[name], random, KEYS)
        return Case(f"{name}, {found.what}", (self.files[name], found))

    def attempt(self, case: Case[tuple[Files, Damage]]) -> bool:
        return launched(config_of(self._scratch.written(*case.value))) is not None

    def close(self) -> None:
        pass


measure = Kind("checkpoints", "damaged checkpoint folders", 5_000, Checkpoints).measure
