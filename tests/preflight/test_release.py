"""What is known of each SGLang version, and how an interpreter is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime_spec.errors import ConfigError
from slime_spec.sglang.flags import sglang_version
from slime_spec.sglang.interpreter import find_release, installed_in
from slime_spec.sglang.releases import release_of
from tests.support.doctor_facts import python_with


@pytest.mark.parametrize(
    ("text", "reaches_draft", "selective", "draft_alone"),
    [
        ("0.5.6", {"tensor"}, set(), False),
        ("0.5.9", {"tensor"}, set(), False),
        ("0.5.10.post1", {"tensor"}, {"tensor"}, False),
        ("0.5.12.post1", {"tensor", "disk"}, {"tensor"}, False),
        ("0.5.20", {"tensor", "disk"}, {"tensor"}, False),
        ("0.5.21", {"tensor", "distributed", "disk"}, {"tensor", "distributed"}, True),
        ("0.6.0", {"tensor", "distributed", "disk"}, {"tensor", "distributed"}, True),
    ],
)
def test_each_version_has_its_weight_update_contract(text, reaches_draft, selective, draft_alone) -> None:
    contract = release_of(text).weight_contract
    assert (contract.reaches_draft, contract.selective, contract.draft_alone) == (reaches_draft, selective, draft_alone)


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("0.5.10.post1", "spec_accept_token_num"),
        ("0.5.11", "spec_accepted_drafts"),
        ("0.5.12.post1", "spec_num_correct_drafts"),
        ("0.5.23", "spec_num_correct_drafts"),
    ],
)
def test_each_version_has_its_generation_of_metadata_keys(text: str, correct: str) -> None:
    assert release_of(text).metadata.correct == correct


@pytest.mark.parametrize("text", ["0.0.0.dev1+gd7c8b9ab9", "nightly"])
def test_a_build_from_source_is_judged_as_the_pinned_version_and_shown_as_itself(text: str) -> None:
    built = release_of(text)
    assert (built.version, built.text) == (release_of(sglang_version()).version, text)


def test_an_interpreter_with_sglang_is_believed_without_importing_it(tmp_path: Path) -> None:
    """A package whose import would fail, found by its metadata alone."""
    site = tmp_path / "site"
    (site / "sglang" / "srt" / "configs").mkdir(parents=True)
    (site / "sglang" / "srt" / "configs" / "own.py").write_text('class OwnConfig:\n    model_type = "own_family"\n')
    (site / "transformers" / "models" / "llama").mkdir(parents=True)
    for package in ("sglang", "transformers"):
        (site / package / "__init__.py").write_text("raise RuntimeError('imported')")
    release = find_release(str(python_with(tmp_path, sglang="0.5.12.post1", torch="2.11.0+cu130")))
    assert (release.version, release.text, release.torch) == ((0, 5, 12), "0.5.12.post1", "2.11.0+cu130")
    assert release.is_installed
    assert release.model_types == {"llama", "own_family"}


@pytest.mark.parametrize("python", ["/nonexistent/python", "/bin/false"])
def test_an_interpreter_that_does_not_answer_is_judged_as_the_pinned_version(python: str) -> None:
    release = find_release(python)
    assert release.text == sglang_version()
    assert not release.is_installed


ODD_ANSWERS = (
    *("SLIME_SPEC {", "SLIME_SPEC \\377", "SLIME_SPEC {}", "SLIME_SPEC [1]", "SLIME_SPEC 5", "\\377\\376"),
    *("SLIME_SPEC " + "[" * 20_000, 'SLIME_SPEC {"sglang": 5}'),
)


@pytest.mark.parametrize("output", ODD_ANSWERS)
def test_a_program_that_answers_anything_is_no_working_sglang(output: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nprintf '{output}'\n")
    python.chmod(0o755)
    assert find_release(str(python)).text == sglang_version()
    with pytest.raises(ConfigError, match="must have a working sglang"):
        installed_in(str(python))
