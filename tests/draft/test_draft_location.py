"""Where the draft of a run is: one answer for the doctor, the servers' flags and the engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slime_spec.checkpoints.draft_location import BUILTIN, DraftLocation, builtin_folder, locate_draft
from slime_spec.config.tree import Config, ModelConfig, SpeculativeConfig
from slime_spec.errors import ConfigError
from slime_spec.preflight.gather import gather
from slime_spec.sglang.arguments import speculative_flags

SHIPPED = f"{BUILTIN}smollm2-135m-eagle3"


def located(algorithm: str, path: str | None, target: str = "/target") -> DraftLocation | None:
    return locate_draft(SpeculativeConfig(algorithm=algorithm, draft_model_path=path), target)


@pytest.mark.parametrize("algorithm", ["NONE", "NGRAM", "LOOKUP", "HISTORY"])
def test_what_drafts_from_text_has_no_folder(algorithm: str) -> None:
    assert located(algorithm, None) is None


@pytest.mark.parametrize("algorithm", ["EAGLE", "NEXTN"])
def test_a_draft_without_a_folder_is_the_targets_own_layer(algorithm: str, tmp_path: Path) -> None:
    target = str(tmp_path)
    assert located(algorithm, None, target) == DraftLocation("in_target", target)
    named = f"{tmp_path}/../{tmp_path.name}"  # the same folder under another name
    assert located(algorithm, named, target) == DraftLocation("in_target", named)


@pytest.mark.parametrize("algorithm", ["EAGLE3", "STANDALONE", "DFLASH", "DSPARK"])
def test_other_networks_are_nowhere_until_they_are_named(algorithm: str) -> None:
    assert located(algorithm, None) is None
    kind = "whole" if algorithm == "STANDALONE" else "head"
    assert located(algorithm, "/draft") == DraftLocation(kind, "/draft")


def test_a_target_may_be_its_own_whole_draft(tmp_path: Path) -> None:
    assert located("STANDALONE", str(tmp_path), str(tmp_path)) == DraftLocation("whole", str(tmp_path))


def test_a_shipped_draft_is_a_folder_of_the_package() -> None:
    found = located("EAGLE3", SHIPPED)
    assert found == DraftLocation("head", builtin_folder(SHIPPED))
    assert (Path(found.folder) / "config.json").is_file()
    with pytest.raises(ConfigError, match="must be one of"):
        located("EAGLE3", f"{BUILTIN}nothing")
    flags = speculative_flags(SpeculativeConfig(algorithm="EAGLE3", draft_model_path=SHIPPED), "/target")
    assert flags["speculative_draft_model_path"] == found.folder


@pytest.mark.parametrize("algorithm", ["EAGLE3", "DFLASH", "DSPARK"])
def test_the_doctor_looks_at_the_draft_of_every_algorithm_that_has_one(algorithm: str, tmp_path: Path) -> None:
    for name in ("target", "draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"architectures": [name]}))
    config = Config(
        model=ModelConfig(hf_checkpoint=str(tmp_path / "target")),
        speculative=SpeculativeConfig(algorithm=algorithm, draft_model_path=str(tmp_path / "draft")),
    )
    (facts,) = gather(config, frozenset())
    assert facts.draft is not None
    assert (facts.draft.architecture, facts.draft_kind) == ("draft", "head")
