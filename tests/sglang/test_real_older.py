"""A real server of the older contract (0.5.20): one flag keeps the target's push out of the draft."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rollout.sglang_engine.recordings import recordings
from slime_spec.errors import PushError
from slime_spec.sglang.metadata import GENERATIONS, spec_counters
from tests.support.sglang_real import Models, Real, cpu_environment, greedy, sglang_python, started
from tests.support.sglang_recording import recording

pytestmark = [pytest.mark.long, pytest.mark.sglang_server, pytest.mark.proves("rollout.sglang_engine")]

RELEASE, ALGORITHM = "0.5.20", "EAGLE3"
NUM_TOKENS = 40


@pytest.fixture(scope="module")
def older(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    """An EAGLE-3 draft with a reduced vocabulary: the target's tensors, loaded into it, would end the server."""
    config = models.config(ALGORITHM, tmp_path_factory.mktemp("older"), python=sglang_python(RELEASE))
    with cpu_environment(), started(config) as engine:
        yield Real(ALGORITHM, engine)


def test_its_greedy_speculation_is_greedy_decoding_in_transformers(older: Real, models: Models) -> None:
    samples = older.generate(NUM_TOKENS)
    assert [sample.token_ids for sample in samples] == [ids for ids, _ in greedy(models.target, NUM_TOKENS)]


def test_it_answers_as_recorded_with_two_generations_of_counters_that_agree(older: Real) -> None:
    made, kept = recording(older), recordings()
    assert made["meta_info"].keys() == kept["meta_info"][RELEASE].keys()
    assert made["tensor_fields"] == kept["tensor_fields"][RELEASE]
    meta = made["meta_info"]
    newest, oldest = (
        {key: meta[key] for key in ("spec_verify_ct", names.correct, names.proposed, names.histogram)}
        for names in GENERATIONS[:2]
    )
    assert spec_counters(newest) == spec_counters(oldest)
    assert spec_counters(newest).num_rounds > 0


def test_a_targets_push_leaves_its_draft_alone(older: Real) -> None:
    """There are no checksums by side: the draft drafts as before once the target is what it was."""
    before = older.generate(NUM_TOKENS)
    assert older.push(older.other_target(), 1, verify=True).verified
    changed = older.generate(NUM_TOKENS)
    assert {sample.weight_version for sample in changed} == {1}
    assert [sample.token_ids for sample in changed] != [sample.token_ids for sample in before]
    older.push(older.target_weights, 2, verify=True)
    back = older.generate(NUM_TOKENS)
    assert [(sample.token_ids, sample.spec) for sample in back] == [
        (sample.token_ids, sample.spec) for sample in before
    ]
    assert sum(sample.spec.num_correct for sample in back) > 0


def test_a_drafts_push_is_refused_by_name_before_anything_is_sent(older: Real) -> None:
    before = older.generate(NUM_TOKENS)
    with pytest.raises(PushError, match=r"no way to update the draft alone.*0\.5\.21 or newer"):
        older.push(older.draft_weights, 3, "draft")
    assert [sample.spec for sample in older.generate(NUM_TOKENS)] == [sample.spec for sample in before]
