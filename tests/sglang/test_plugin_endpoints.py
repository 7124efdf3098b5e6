"""The plug-in's own answers: checksums by side, and what the canary makes of a response and the target's reading."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from rollout.sglang_engine.plugin.canary import Asked, NoCanary, judged
from rollout.sglang_engine.plugin.endpoints import of_side
from slime_spec.speculation.accepted_mean import AcceptedMean

SUMS = {"lm_head.weight": "aa", "draft.fc.weight": "bb", "model.norm.weight": "cc", "draft_step_1.fc.weight": "dd"}
RANK = {"checksums": SUMS, "per_gpu_checksum": "all of them", "parallelism_info": {"tp_rank": 0}}


def test_checksums_are_told_apart_by_side_and_summed_up_anew() -> None:
    target, draft = of_side(RANK, "target"), of_side(RANK, "draft")
    assert target["checksums"] == {"lm_head.weight": "aa", "model.norm.weight": "cc"}
    assert draft["checksums"] == {"draft.fc.weight": "bb", "draft_step_1.fc.weight": "dd"}
    assert draft["per_gpu_checksum"] == hashlib.sha256(b"draft.fc.weightbbdraft_step_1.fc.weightdd").hexdigest()
    assert target["parallelism_info"] == {"tp_rank": 0}
    assert of_side(RANK, "all") == RANK


def test_the_canary_has_a_prompt_of_its_own_that_every_vocabulary_has() -> None:
    asked = Asked.read({}, vocab_size=10)
    assert len(asked.input_ids) == 16
    assert set(asked.input_ids) <= set(range(10))
    assert Asked.read({"input_ids": [4, 5], "max_new_tokens": 8}, 10).input_ids == [4, 5]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"input_ids": []}, "token ids from 0 to 9"),
        ({"input_ids": [3, 10]}, "token ids from 0 to 9"),
        ({"input_ids": [True]}, "token ids from 0 to 9"),
        ({"max_new_tokens": 1}, "at least 2"),
        ({"tolerance": float("nan")}, "from 0 up"),
        ({"temperature": 1.0}, "unknown: temperature"),
    ],
)
def test_what_no_canary_can_be_is_refused_in_words(body: dict[str, Any], says: str) -> None:
    with pytest.raises(NoCanary, match=says):
        Asked.read(body, vocab_size=10)


def drafted(tokens: list[int], correct: int, rounds: int = 2) -> dict[str, Any]:
    counters = {
        "spec_verify_ct": rounds,
        "spec_num_correct_drafts": correct,
        "spec_num_proposed_drafts": 3 * rounds,
        "completion_tokens": len(tokens),
        "weight_version": "7",
        "output_token_logprobs": [(-0.5, token, None) for token in tokens],
    }
    return {"output_ids": tokens, "meta_info": counters}


def read(tokens: list[int], best: list[tuple[float, int]], own: list[float]) -> dict[str, Any]:
    """The target's reading: first the last token of the prompt, whose own logprob nobody computes."""
    rows = [(None, 99, None), *((logprob, token, None) for logprob, token in zip(own, tokens, strict=True))]
    return {
        "output_ids": [0],
        "meta_info": {
            "input_token_logprobs": rows,
            "input_top_logprobs": [None, *([(logprob, token, None)] for logprob, token in best)],
        },
    }


def test_a_response_of_the_targets_best_tokens_is_greedy() -> None:
    reading = read([5, 6, 7], [(-0.5, 5), (-0.5, 6), (-0.5, 7)], [-0.5, -0.5, -0.5])
    verdict = judged(drafted([5, 6, 7], correct=3), reading, 0.25, AcceptedMean(0.5))
    assert (verdict.is_greedy, verdict.num_differing, verdict.largest_regret) == (True, 0, 0.0)
    assert (verdict.num_rounds, verdict.num_correct, verdict.accepted_per_round) == (2, 3, 1.5)
    assert verdict.weight_version == "7"


def test_nearly_equal_tokens_may_change_places_and_others_may_not() -> None:
    near = read([5, 6], [(-0.5, 5), (-0.4, 8)], [-0.5, -0.5])
    far = read([5, 6], [(-0.5, 5), (-0.4, 8)], [-0.5, -3.0])
    verdicts = [judged(drafted([5, 6], 3), reading, 0.25, AcceptedMean(0.5)) for reading in (near, far)]
    assert [verdict.is_greedy for verdict in verdicts] == [True, False]
    assert [verdict.num_differing for verdict in verdicts] == [1, 1]
    assert [verdict.largest_regret for verdict in verdicts] == pytest.approx([0.1, 2.6])
    assert verdicts[1].largest_logprob_difference == 2.5


def test_drafts_that_are_refused_as_never_before_are_told_by_the_canaries_before() -> None:
    mean = AcceptedMean(0.5)
    reading = read([5, 6], [(-0.5, 5), (-0.5, 6)], [-0.5, -0.5])
    good, lost = (judged(drafted([5, 6], correct), reading, 0.25, mean) for correct in (4, 1))
    assert (good.is_accepted_as_before, good.mean_accepted_per_round) == (True, 2.0)
    assert (lost.is_accepted_as_before, lost.mean_accepted_per_round) == (False, 2.0)
    assert lost.is_greedy, "a lost draft costs time and changes no token"


def test_a_reading_that_is_not_whole_is_no_verdict() -> None:
    short = read([5], [(-0.5, 5)], [-0.5])
    with pytest.raises(NoCanary, match="lack what is compared"):
        judged(drafted([5, 6, 7], 3), short, 0.25, AcceptedMean(0.5))
