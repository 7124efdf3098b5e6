"""Damaged draft folders of every format go through a launch's checks and the load of the draft."""

from __future__ import annotations

from pathlib import Path
from random import Random

from slime_spec.algorithms import STANDALONE, algorithm_of_family
from slime_spec.bench.robustness.damage import Damage, Files, damage
from slime_spec.bench.robustness.fuzzer import Case, Kind
from slime_spec.bench.robustness.launched import Scratch, config_of, files_of, launched
from slime_spec.bench.robustness.tiny import DRAFTS, make_draft, make_target
from slime_spec.checkpoints.families import dspark, eagle3
from slime_spec.checkpoints.families.llama import LLAMA
from slime_spec.checkpoints.folder import ANY_FAMILY
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.tree import SpeculativeConfig

KEYS = sorted({*ANY_FAMILY, *LLAMA.keys, *eagle3.KEYS, *dspark.KEYS, "text_config"})


class Drafts:
    """Fuzzes the drafts of one target: networks of every format, and a whole model."""

    def __init__(self, folder: Path) -> None:
        self._scratch = Scratch(folder / "damaged")
        self._target = make_target(folder / "target", LLAMA)
        spec = ModelSpec.from_folder(self._target)
        made = {algorithm_of_family(family).name: make_draft(folder / family, family, spec) for family in DRAFTS}
        made[STANDALONE.name] = make_target(folder / "whole", LLAMA, is_sharded=True, num_hidden_layers=1)
        self._plain = launched(config_of(self._target))
        self.files = {algorithm: files_of(path) for algorithm, path in made.items()}

    def make(self, random: Random) -> Case[tuple[str, Files, Damage]]:
        algorithm = random.choice([*self.files])
        found = damage(self.files[algorithm], random, KEYS)
        return Case(f"{algorithm}, {found.what}", (algorithm, self.files[algorithm], found))

    def attempt(self, case: Case[tuple[str, Files, Damage]]) -> bool:
        algorithm, files, found = case.value
        draft = self._scratch.written(files, found)
        speculative = SpeculativeConfig(algorithm=algorithm, draft_model_path=str(draft))
        tokens = launched(config_of(self._target, speculative))
        assert tokens in (None, self._plain), f"a draft changed the target's tokens: {tokens}, not {self._plain}"
        return tokens is not None

    def close(self) -> None:
        pass


measure = Kind("drafts", "damaged draft folders", 1_000, Drafts).measure
