"""What slime, miles and verl make of a server's responses with the plug-in, in each generation of SGLang's keys."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from rollout.sglang_engine.plugin.metadata import Completion
from rollout.sglang_engine.recordings import recordings
from slime_spec.sglang.metadata import GENERATIONS, spec_counters

VERSIONS = sorted(recordings()["meta_info"])
# One of a chain of three drafts: 25 tokens, the prefill's one and 10 rounds' (10 bonus tokens and 14 drafts).
ROUNDS, PROPOSED, CORRECT, TOKENS = 10, 30, 14, 25
HISTOGRAM = [2, 3, 4, 1]  # 0 * 2 + 1 * 3 + 2 * 4 + 3 * 1 = 14


def response(*generations: int) -> dict[str, Any]:
    """A response under the keys of some generations, which are numbered from the newest."""
    told: dict[str, Any] = {"completion_tokens": TOKENS, "spec_verify_ct": ROUNDS}
    for names in (GENERATIONS[number] for number in generations):
        told |= {names.correct: CORRECT, names.proposed: PROPOSED, names.histogram: HISTOGRAM}
    return told


def completed(meta: dict[str, Any], num_steps: int | None = 3, completion: Completion | None = None) -> dict[str, Any]:
    """As SGLang's hook leaves the metadata of one response."""
    meta = dict(meta)
    manager = SimpleNamespace(server_args=SimpleNamespace(speculative_num_steps=num_steps))
    assert (completion or Completion()).complete(None, manager, meta, recv_obj=None, i=0) is None
    return meta


def slimes(*metas: dict[str, Any]) -> tuple[float, float]:
    """slime's and miles' rate and length of one sample: sums over its turns, then ratios; 0 where a sum is 0."""
    accepted, drafted, rounds, tokens = (
        sum(meta.get(key, 0) for meta in metas)
        for key in ("spec_accept_token_num", "spec_draft_token_num", "spec_verify_ct", "completion_tokens")
    )
    return (accepted / drafted if drafted else 0.0), (tokens / rounds if rounds else 0.0)


def verls(meta: dict[str, Any], num_draft_tokens: int = 4) -> tuple[float, float]:
    """verl's of one sample: it takes the setting where the drafted tokens are not told, and adds a bonus token."""
    drafted = meta.get("spec_draft_token_num", num_draft_tokens)
    accepted, rounds = meta.get("spec_accept_token_num", 0), meta.get("spec_verify_ct", 0)
    return (accepted / drafted if drafted else 0.0), (1.0 + accepted / rounds if rounds else 0.0)


@pytest.mark.parametrize("generations", [(0,), (0, 1), (1,), (2,), (0, 1, 2)])
def test_slimes_and_verls_numbers_are_right_for_every_generation_of_keys(generations: tuple[int, ...]) -> None:
    meta = completed(response(*generations))
    assert slimes(meta) == (14 / 30, 25 / 10)
    assert verls(meta) == (14 / 30, 1 + 14 / 10)


def test_without_the_plug_in_they_are_zero_for_what_newer_servers_write() -> None:
    assert slimes(response(0)) == (0.0, 25 / 10)
    assert verls(response(0)) == (0.0, 1.0)


@pytest.mark.parametrize("version", VERSIONS)
def test_recorded_responses_give_slime_what_the_server_counted(version: str) -> None:
    recorded = recordings()["meta_info"][version]
    rate, length = slimes(completed(recorded))
    assert rate == pytest.approx(recorded["spec_accept_rate"], rel=1e-12)
    assert length == pytest.approx(recorded["spec_accept_length"], rel=1e-12)


def test_a_sample_of_several_turns_is_pooled() -> None:
    short = {"completion_tokens": 3, "spec_verify_ct": 2, "spec_num_correct_drafts": 0, "spec_num_proposed_drafts": 6}
    turns = [completed(response(0)), completed({**short, "spec_correct_drafts_histogram": [2]})]
    assert slimes(*turns) == (14 / 36, 28 / 12)


def test_every_generation_has_its_counters_and_histogram_and_there_is_one_number_per_position() -> None:
    meta = completed(response(0))
    for names in GENERATIONS:
        assert (meta[names.correct], meta[names.proposed], meta[names.histogram]) == (CORRECT, PROPOSED, HISTOGRAM)
    # 8 of the 10 rounds accepted a first draft, 5 a second, 1 a third.
    assert meta["speculative_accepted_tokens_per_pos"] == [8, 5, 1]
    assert sum(meta["speculative_accepted_tokens_per_pos"]) == CORRECT
    assert spec_counters(meta, num_steps=3) == spec_counters(response(0), num_steps=3)


def test_a_depth_that_nobody_tells_is_the_histograms() -> None:
    assert completed(response(0), num_steps=None)["speculative_accepted_tokens_per_pos"] == [8, 5, 1]


def test_what_sglang_wrote_stays_as_it_is() -> None:
    own = response(0) | {"spec_accept_rate": 0.125, "spec_accept_length": 9.0, "id": "r"}
    assert own.items() <= completed(own).items()


def test_a_response_without_a_verify_round_counts_as_nothing_drafted() -> None:
    meta = completed({"completion_tokens": 1})
    assert slimes(meta) == (0.0, 0.0)
    assert verls(meta) == (0.0, 0.0)
    assert (meta["spec_draft_token_num"], meta["spec_num_proposed_drafts"], meta["spec_verify_ct"]) == (0, 0, 0)


def test_counters_under_unknown_keys_are_left_alone_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    unknown = {"completion_tokens": TOKENS, "spec_verify_ct": ROUNDS, "spec_drafts_of_tomorrow": CORRECT}
    counting = Completion()
    with caplog.at_level(logging.ERROR, logger="slime_spec.plugin"):
        assert [completed(unknown, completion=counting) for _ in range(2)] == [unknown, unknown]
    assert counting.counts == {"responses_with_unknown_counters": 2}
    assert [record.getMessage() for record in caplog.records if "spec_drafts_of_tomorrow" in record.getMessage()] == [
        "slime_spec plug-in: responses keep SGLang's own keys only: "
        "UnknownMetadataError('10 verify rounds under unknown keys: spec_drafts_of_tomorrow, spec_verify_ct')"
    ]


@pytest.mark.parametrize(
    "odd",
    [
        {"spec_num_correct_drafts": None},
        {"spec_num_proposed_drafts": "many"},
        {"spec_correct_drafts_histogram": [None]},
        {"completion_tokens": None},
    ],
)
def test_counters_that_are_no_numbers_never_reach_sglangs_loop(odd: dict[str, Any]) -> None:
    """What is raised there ends the loop that hands out every response."""
    counting, given = Completion(), response(0) | odd
    assert completed(given, completion=counting) == given
    assert counting.counts == {"responses_with_unknown_counters": 1}
