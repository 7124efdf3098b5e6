"""The fuzzers of checkpoints and drafts: whole folders are accepted, and a damaged one is the same for one seed."""

from __future__ import annotations

from random import Random

import pytest

from slime_spec.bench.robustness.checkpoints import Checkpoints
from slime_spec.bench.robustness.damage import SPECIALS, Damage
from slime_spec.bench.robustness.drafts import Drafts
from slime_spec.bench.robustness.fuzzer import Case

WHOLE = Damage("nothing", {})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> Drafts:
    return Drafts(tmp_path_factory.mktemp("drafts"))


def test_a_whole_checkpoint_of_every_family_is_accepted(checkpoints: Checkpoints) -> None:
    for name, files in checkpoints.files.items():
        assert checkpoints.attempt(Case(name, (files, WHOLE))), name


def test_a_whole_draft_of_every_format_is_accepted_and_leaves_the_tokens_as_they_are(drafts: Drafts) -> None:
    for algorithm, files in drafts.files.items():
        assert drafts.attempt(Case(algorithm, (algorithm, files, WHOLE))), algorithm


@pytest.mark.parametrize("special", SPECIALS, ids=lambda special: special.kind)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_what_stands_in_the_place_of_a_file_is_refused(checkpoints: Checkpoints, name: str, special: object) -> None:
    """A pipe, a device and a file of a terabyte are not waited for and not read."""
    damaged = Damage("", {name: special})  # type: ignore[dict-item]
    assert not checkpoints.attempt(Case("llama", (checkpoints.files["llama"], damaged)))


def test_a_seed_alone_makes_the_same_damage(checkpoints: Checkpoints, drafts: Drafts) -> None:
    for fuzzer in (checkpoints, drafts):
        made = [fuzzer.make(Random(f"seed {seed}")) for seed in range(50)]
        again = [fuzzer.make(Random(f"seed {seed}")) for seed in range(50)]
        assert made == again
        assert len({case.what for case in made}) > 45
