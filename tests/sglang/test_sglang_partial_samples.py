"""Samples that were aborted, here or on another engine, and go on: what is sent, and what comes back as one sample."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from rollout.sglang_engine.fake import FakeServer, next_token
from rollout.sglang_engine.fake_http import Body
from rollout.sglang_engine.sample import GrowingSample, Reading
from slime_spec.errors import ConfigError
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams, SpecCounters
from tests.sglang.conftest import Connect

PROMPT = (5, 6, 7)
PARAMS = SamplingParams(max_new_tokens=30, min_new_tokens=12)


def expected(num_tokens: int) -> tuple[int, ...]:
    ids: list[int] = []
    for position in range(num_tokens):
        ids.append(next_token(ids[-1] if ids else PROMPT[-1], len(PROMPT) + position))
    return tuple(ids)


def part(num_tokens: int, index: int = 0, **fields: Any) -> GeneratedSample:
    """What an engine left of a sample: after the first token, rounds of three."""
    rounds = max(0, num_tokens - 1) // 3
    spec = SpecCounters(rounds, 3 * rounds, (0, 0, rounds), 3 * rounds, num_steps=3) if rounds else SpecCounters()
    ids = expected(num_tokens)
    return replace(
        GeneratedSample("group", index, ids, (-0.25,) * num_tokens, "abort", 0, 3, spec, e2e_latency_s=100.0), **fields
    )


def test_what_is_left_is_asked_for_and_the_whole_comes_back(connect: Connect) -> None:
    on_fake = connect()
    partial = part(10, index=6, draft_version=4, num_preemptions=2, cached_tokens=1, lossy=True)
    (sample,) = on_fake.engine.generate(GroupRequest("group", PROMPT, (77,), PARAMS, (partial,)))
    (body,) = on_fake.server.told("/generate")
    assert body["input_ids"] == [*PROMPT, *expected(10)]
    sampling = body["sampling_params"]
    assert (sampling["max_new_tokens"], sampling["min_new_tokens"], sampling["sampling_seed"]) == (20, 2, 77)
    assert (sample.sample_index, sample.token_ids, sample.finish_reason) == (6, expected(30), "length")
    assert sample.logprobs == partial.logprobs + tuple(-0.5 - token / 100 for token in expected(30)[10:])
    assert sample.num_prompt_tokens == 3
    # One token of the prefill, then rounds of three: 20 tokens are 7 rounds.
    assert sample.spec == SpecCounters(3 + 7, 30, (0, 0, 10), 30, num_steps=3)
    assert 100.0 < sample.e2e_latency_s < 110.0
    assert (sample.draft_version, sample.num_preemptions, sample.lossy) == (4, 2, True)
    assert (sample.weight_version, sample.version_spans) == (0, ())


def test_the_spans_of_both_parts_are_joined(connect: Connect) -> None:
    on_fake = connect()
    server = on_fake.server
    server.weight_version = "5"
    partial = part(9, weight_version=2, version_spans=((0, 2), (4, 3)))
    request = GroupRequest("group", PROMPT, (1,), PARAMS, (partial,))
    (sample,) = on_fake.engine.generate(request)
    assert (sample.weight_version, sample.version_spans) == (2, ((0, 2), (4, 3), (9, 5)))
    server.weight_version = "3"
    (sample,) = on_fake.engine.generate(request)
    assert sample.version_spans == ((0, 2), (4, 3))


def test_a_sample_without_a_token_brings_its_index_and_its_time(connect: Connect) -> None:
    on_fake = connect()
    partials = (part(0, index=3), part(4, index=1))
    first, second = sorted(
        on_fake.engine.generate(GroupRequest("group", PROMPT, (1, 2), PARAMS, partials)),
        key=lambda each: -each.sample_index,
    )
    assert (first.sample_index, second.sample_index) == (3, 1)
    assert first.token_ids == second.token_ids == expected(30)
    assert first.e2e_latency_s > 100.0
    assert first.spec.num_rounds == 10


@pytest.mark.parametrize(
    "params", [{"stop": ("a",)}, {"frequency_penalty": 0.5}, {"presence_penalty": 0.5}, {"repetition_penalty": 1.3}]
)
def test_where_going_on_would_bend_the_distribution_it_starts_anew(connect: Connect, params: dict[str, Any]) -> None:
    on_fake = connect()
    partial = part(10, weight_version=2, lossy=True, draft_version=7)
    request = GroupRequest("group", PROMPT, (1,), replace(PARAMS, **params), (partial,))
    (sample,) = on_fake.engine.generate(request)
    assert on_fake.server.told("/generate")[0]["input_ids"] == list(PROMPT)
    assert sample.token_ids == expected(30)
    assert sample.logprobs[0] != partial.logprobs[0]
    assert (sample.weight_version, sample.version_spans, sample.lossy, sample.draft_version) == (0, (), False, 0)
    assert sample.spec.num_rounds == 10
    assert sample.e2e_latency_s > 100.0


def test_a_part_without_its_rounds_leaves_the_whole_without_counters(connect: Connect) -> None:
    on_fake = connect()
    unknown = GroupRequest("group", PROMPT, (1,), PARAMS, (part(10, spec=SpecCounters()),))
    assert next(iter(on_fake.engine.generate(unknown))).spec == SpecCounters()
    first_token_only = replace(unknown, partials=(part(1, spec=SpecCounters()),))
    assert next(iter(on_fake.engine.generate(first_token_only))).spec.num_rounds == 10


def test_a_part_that_the_server_could_die_of_is_refused(connect: Connect) -> None:
    on_fake = connect()
    partial = replace(part(2), token_ids=(5, 257))
    with pytest.raises(ConfigError, match="token ids from 0 to 256"):
        on_fake.engine.generate(GroupRequest("group", PROMPT, (1,), PARAMS, (partial,)))
    assert on_fake.server.told("/generate") == []


@pytest.mark.parametrize("logprob", [math.nan, -math.inf, 0.5])
def test_a_part_whose_logprobs_cannot_be_true_is_refused(connect: Connect, logprob: float) -> None:
    on_fake = connect()
    partial = replace(part(2), logprobs=(-0.5, logprob))
    with pytest.raises(ConfigError, match="must hold logprobs of tokens"):
        on_fake.engine.generate(GroupRequest("group", PROMPT, (1,), PARAMS, (partial,)))
    assert on_fake.server.told("/generate") == []


def aborted(token_ids: list[int], **params: Any) -> GeneratedSample:
    """What a server sends that was told to abort: all of its last round, wherever the response ends."""
    request = GroupRequest("group", PROMPT, (1,), SamplingParams(max_new_tokens=6, **params))
    sample = GrowingSample(request, 0, Reading(0, 3, True, 257, frozenset({2})))
    sample.body("rid", "key")
    triples = [[-1.0, token, None] for token in token_ids]
    meta = {
        "completion_tokens": len(token_ids),
        "output_token_logprobs": triples,
        "weight_version": "1",
        "finish_reason": {"type": "abort", "message": "Abort"},
        "weight_versions": [{"version": "1", "start": 0, "end": 3}, {"version": "2", "start": 3, "end": 9}],
    }
    sample.part.take({"output_ids": token_ids, "meta_info": meta})
    return sample.finished(1.0, draft_version=None)


@pytest.mark.parametrize(
    ("token_ids", "params", "kept", "reason", "matched"),
    [
        ([8, 9, 10], {}, 3, "abort", None),
        ([8, 9, 2, 10, 11], {}, 3, "stop", 2),
        ([8, 9, 2, 10, 11], {"ignore_eos": True}, 5, "abort", None),
        ([8, 9, 7, 2, 11], {"stop_token_ids": (7,)}, 3, "stop", 7),
        ([8, 9, 10, 11, 12, 13, 14, 2], {}, 6, "length", None),
    ],
)
def test_an_aborted_sample_holds_nothing_beyond_its_end(
    token_ids: list[int], params: dict[str, Any], kept: int, reason: str, matched: int | None
) -> None:
    sample = aborted(token_ids, **params)
    assert sample.token_ids == tuple(token_ids[:kept])
    assert len(sample.logprobs) == kept
    assert (sample.finish_reason, sample.matched_stop) == (reason, matched)
    assert sample.version_spans == (() if kept == 3 else ((0, 1), (3, 2)))


class LateServer(FakeServer):
    """Knows of a request only some time after it came."""

    async def _chunks(self, body: Body) -> AsyncIterator[Body]:
        await asyncio.sleep(0.4)
        async for chunk in super()._chunks(body):
            yield chunk


def test_an_abort_that_overtakes_its_request_is_told_again(connect: Connect) -> None:
    on_fake = connect(LateServer(delay_s=0.02))
    generation = on_fake.engine.generate(GroupRequest("long", PROMPT, (1,), SamplingParams(max_new_tokens=400)))
    time.sleep(0.15)
    generation.abort()
    assert len(on_fake.server.told("/abort_request")) == 1
    (sample,) = generation
    assert sample.finish_reason == "abort"
    assert 0 < len(sample.token_ids) < 100
    assert len(on_fake.server.told("/abort_request")) > 1
