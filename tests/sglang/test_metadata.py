"""Responses of every generation of SGLang, as recorded, read as the same counters."""

from __future__ import annotations

from typing import Any

import pytest

from rollout.sglang_engine.recordings import recordings
from slime_spec.sglang.metadata import UnknownMetadataError, generation_of, spec_counters, speculative_keys
from slime_spec.speculation.counters import pooled
from slime_spec.types import SpecCounters

VERSIONS = sorted(recordings()["meta_info"])
DRAFTS_PER_ROUND = 15  # of the tree that was recorded, four wide and three deep


def recorded(version: str) -> dict[str, Any]:
    meta: dict[str, Any] = recordings()["meta_info"][version]
    return meta


def test_every_recording_says_where_it_is_from() -> None:
    provenance = recordings()["provenance"]
    assert sorted(provenance) == VERSIONS
    assert provenance["0.5.21"].startswith("recorded from a server")
    assert all(told.startswith(("recorded from a server", "not recorded: ")) for told in provenance.values())


@pytest.mark.parametrize("version", VERSIONS)
def test_every_generation_of_keys_gives_the_same_counts(version: str) -> None:
    spec = spec_counters(recorded(version), num_steps=3)
    told = recorded("0.5.21")
    counts = told["spec_verify_ct"], told["spec_num_proposed_drafts"], told["spec_num_correct_drafts"]
    assert min(counts) > 0
    assert (spec.num_rounds, spec.num_proposed, spec.num_correct, spec.num_steps) == (*counts, 3)
    assert spec.num_proposed == DRAFTS_PER_ROUND * spec.num_rounds


@pytest.mark.parametrize("version", [version for version in VERSIONS if version != "0.5.8"])
def test_a_histogram_is_read_where_there_is_one(version: str) -> None:
    spec = spec_counters(recorded(version))
    assert list(spec.histogram) == recorded("0.5.21")["spec_correct_drafts_histogram"]
    assert sum(spec.histogram) == spec.num_rounds
    assert spec.num_correct_unbinned == 0


def test_without_a_histogram_the_accepted_drafts_are_still_counted() -> None:
    spec = spec_counters(recorded("0.5.8"))
    assert spec.histogram == ()
    assert spec.num_correct == spec.num_correct_unbinned == recorded("0.5.8")["spec_accept_token_num"] > 0


def test_a_response_that_has_two_generations_of_keys_is_read_by_the_newest() -> None:
    meta = recorded("0.5.20") | {"spec_accepted_drafts": 99}
    assert spec_counters(meta).num_correct == meta["spec_num_correct_drafts"] != 99
    assert generation_of(meta) is not None


def test_no_keys_mean_that_nothing_was_verified() -> None:
    plain = {key: value for key, value in recorded("0.5.21").items() if not key.startswith("spec_")}
    assert spec_counters(plain) == SpecCounters()


def test_rounds_under_unknown_keys_are_an_error_and_not_zero() -> None:
    with pytest.raises(UnknownMetadataError, match="spec_accepted_tokens_v9"):
        spec_counters({"spec_verify_ct": 3, "spec_accepted_tokens_v9": 4})


def test_ngram_does_not_claim_that_padding_was_drafted() -> None:
    assert spec_counters(recorded("0.5.21"), fills_rounds=False).num_drafted == 0


def test_counters_are_pooled_as_sums() -> None:
    parts = [
        SpecCounters(2, 6, (1, 1), 6, num_steps=3),
        SpecCounters(),
        SpecCounters(3, 9, (1, 0, 0, 2), 9, num_steps=3),
    ]
    whole = pooled(parts)
    assert whole == SpecCounters(5, 15, (2, 1, 0, 2), 15, num_steps=3)
    assert whole.num_correct == sum(part.num_correct for part in parts)
    assert pooled([]) == SpecCounters()


def test_what_our_own_server_writes_reads_back() -> None:
    spec = SpecCounters(num_rounds=3, num_proposed=9, histogram=(1, 0, 1, 1), num_drafted=9, num_steps=3)
    assert spec_counters(speculative_keys(spec, num_tokens=9), num_steps=3) == spec
