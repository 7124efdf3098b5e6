"""Servers that refuse, abort or garble a sample: it goes on where that helps, and what cannot be true is not believed.

Case sglang/03-http has these answers; each test says which value is right.
"""

from __future__ import annotations

import asyncio
import json
import math
import pickle
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from aiohttp import web

from rollout.sglang_engine.client import ProtocolError, ServerGone, ServerRefused
from rollout.sglang_engine.delivery import shown_rows
from rollout.sglang_engine.fake import FakeServer, next_token
from rollout.sglang_engine.fake_http import Body
from rollout.sglang_engine.generation import Aborted, Patience
from rollout.sglang_engine.sample import Part
from slime_spec.errors import ConfigError
from slime_spec.types import GroupRequest, SamplingParams
from slime_spec.weights.messages import ContinueGeneration, PauseGeneration
from tests.sglang.conftest import Connect

PROMPT = (5, 6, 7)
NUM_TOKENS = 60
VOCAB_SIZE = 257
Change = Callable[[Body, Body], None]


def whole(num_tokens: int = NUM_TOKENS) -> tuple[int, ...]:
    ids: list[int] = []
    for position in range(num_tokens):
        ids.append(next_token(ids[-1] if ids else PROMPT[-1], len(PROMPT) + position))
    return tuple(ids)


def request(**params: Any) -> GroupRequest:
    return GroupRequest("group", PROMPT, (1,), SamplingParams(max_new_tokens=NUM_TOKENS, **params))


class Refusing(FakeServer):
    """Answers its first ``times`` requests with ``status``."""

    def __init__(self, status: int, times: int = 1) -> None:
        super().__init__()
        self.status, self.times = status, times

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        if self.times:
            self.times -= 1
            return web.json_response({"error": {"message": "the reason"}}, status=self.status)
        return await super()._generate(request)


@pytest.mark.parametrize(("status", "times"), [(429, 1), (408, 1), (503, 4), (500, 1), (502, 1), (504, 1)])
def test_a_busy_or_failing_server_is_asked_again(connect: Connect, status: int, times: int) -> None:
    on_fake = connect(Refusing(status, times))
    (sample,) = on_fake.engine.generate(request())
    assert sample.token_ids == whole()
    assert on_fake.engine.stats().num_interruptions == times


@pytest.mark.parametrize(("status", "kind"), [(400, ConfigError), (401, RuntimeError), (404, RuntimeError)])
def test_a_refusal_that_will_not_change_is_raised_at_once_and_only_a_bad_request_blames_the_request(
    connect: Connect, status: int, kind: type[Exception]
) -> None:
    on_fake = connect(Refusing(status, 100))
    with pytest.raises(kind, match="the reason") as raised:
        list(on_fake.engine.generate(request()))
    assert isinstance(raised.value, ConfigError) is (status == 400)
    assert status == 400 or f"{on_fake.engine.client.url}/generate was refused ({status})" in str(raised.value)
    assert on_fake.server.times == 99  # type: ignore[attr-defined]


def test_a_server_that_fails_again_and_again_is_named(connect: Connect) -> None:
    on_fake = connect(Refusing(500, 100))
    with pytest.raises(RuntimeError, match=r"sample 0 breaks off again.*/generate was refused .500.: the reason"):
        list(on_fake.engine.generate(request()))


def delays(patience: Patience, reason: ServerGone | ServerRefused) -> list[float]:
    """The waits of a sample that gets no token, until it gives up."""
    return list(iter(lambda: patience.delay_s(reason, False), None))


def test_a_full_queue_is_waited_for_longer_than_a_server_that_fails() -> None:
    busy = delays(Patience(), ServerRefused("/generate", 429, ""))
    assert busy[:6] == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0]
    assert busy[-1] == 5.0
    assert 895.0 < sum(busy) <= 900.0
    assert [Patience().delay_s(ServerGone(""), brought) for brought in (True, False)] == [0.0, 1.0]
    assert delays(Patience(), ServerGone("")) == [1.0, 2.0]


def test_a_busy_server_says_how_long_to_wait_within_bounds() -> None:
    asks = {seconds: delays(Patience(), ServerRefused("/generate", 503, "", seconds)) for seconds in (0.5, 20.0, 1e6)}
    assert asks[0.5][:3] == [0.5, 0.5, 0.8]
    assert asks[20.0] == [20.0] * 45
    assert asks[1e6] == [60.0] * 15
    patience = Patience()
    for _ in range(100):  # tokens came: the wait begins anew
        assert patience.delay_s(ServerRefused("/generate", 503, "", 20.0), True) == 20.0


@pytest.mark.parametrize(("header", "seconds"), [("7", 7.0), ("Fri, 27 Nov 2026 11:00:00 GMT", 0.0), ("-1", 0.0)])
@pytest.mark.parametrize("status", [429, 503])
def test_the_wait_that_a_server_asks_for_is_read_from_its_refusal(
    connect: Connect, status: int, header: str, seconds: float
) -> None:
    on_fake = connect()
    refusal = web.json_response({"error": {"message": "full"}}, status=status, headers={"Retry-After": header})
    on_fake.server.odd["/generate"] = [refusal]

    async def first_chunk() -> None:
        await anext(on_fake.engine.client.stream({}))

    with pytest.raises(ServerRefused, match="full") as raised:
        on_fake.engine.server.loop.call(first_chunk())
    assert raised.value.retry_after_s == pickle.loads(pickle.dumps(raised.value)).retry_after_s == seconds


GARBLED = {"bytes": b"\xff\xfe\x00", "nested": b"[" * 100_000, "digits": b"1" * 5000}


@pytest.mark.parametrize("body", GARBLED.values(), ids=GARBLED)
def test_an_answer_that_is_no_json_is_a_text_and_a_refusal_that_is_none_has_it_as_message(
    connect: Connect, body: bytes
) -> None:
    on_fake = connect()
    text, loop = body.decode(errors="replace"), on_fake.engine.server.loop
    on_fake.server.odd["/model_info"] = [web.Response(body=body), web.Response(body=body, status=500)]
    assert loop.call(on_fake.engine.client.get("/model_info")) == text
    with pytest.raises(ServerRefused) as raised:
        loop.call(on_fake.engine.client.get("/model_info"))
    assert raised.value.message == text[:2000]
    on_fake.server.odd["/generate"] = [web.Response(body=body, status=500)]
    (sample,) = on_fake.engine.generate(request())
    assert sample.token_ids == whole()


@pytest.mark.parametrize("shown", [10**400, "a", None, {}])
def test_rows_that_are_no_numbers_show_nothing(connect: Connect, shown: object) -> None:
    on_fake = connect()
    on_fake.server.rows = {"a.weight": [[shown]]}
    shows = shown_rows(on_fake.engine.client, {"a.weight": torch.zeros(1, 1)}, 2)
    assert on_fake.engine.server.loop.call(shows) == {}


class Queue(FakeServer):
    """Runs ``limit`` requests; aborts the others by itself, as SGLang does with --max-queued-requests."""

    def __init__(self, limit: int) -> None:
        super().__init__(delay_s=0.002)
        self.limit, self.num_refused = limit, 0

    async def _chunks(self, body: Body) -> AsyncIterator[Body]:
        if len(self._running) >= self.limit:
            self.num_refused += 1
            reason = {"type": "abort", "status_code": 503, "message": "The request queue is full."}
            yield self._chunk(body, [], 0, reason, 0, [])
            return
        async for chunk in super()._chunks(body):
            yield chunk


def test_no_sample_is_lost_where_the_queue_is_full(connect: Connect) -> None:
    on_fake = connect(Queue(3))
    samples = on_fake.generate(NUM_TOKENS, num_samples=8)
    assert [sample.token_ids for sample in samples] == [whole()] * 8
    assert {sample.finish_reason for sample in samples} == {"length"}
    assert on_fake.engine.stats().num_interruptions == on_fake.server.num_refused > 0  # type: ignore[attr-defined]


class Aborting(FakeServer):
    """Aborts its first ``times`` requests after some tokens, with ``reason``; the abort repeats only the last token."""

    def __init__(self, times: int = 1, **reason: Any) -> None:
        super().__init__(incremental=True)
        self.times, self.reason = times, {"type": "abort", **reason}

    async def _chunks(self, body: Body) -> AsyncIterator[Body]:
        async for chunk in super()._chunks(body):
            if self.times and chunk["meta_info"]["completion_tokens"] > 20:
                self.times -= 1
                chunk["meta_info"]["finish_reason"] = self.reason
                chunk["output_ids"] = chunk["output_ids"][-1:]
                yield chunk
                return
            yield chunk


@pytest.mark.parametrize("reason", [{"status_code": 503, "message": "Request running timeout reached."}, {}])
def test_a_sample_that_the_server_aborts_by_itself_goes_on_from_its_tokens(
    connect: Connect, reason: dict[str, Any]
) -> None:
    on_fake = connect(Aborting(2, **reason))
    (sample,) = on_fake.engine.generate(request())
    assert (sample.token_ids, sample.finish_reason) == (whole(), "length")
    assert sample.logprobs == tuple(-0.5 - token / 100 for token in whole())
    begun_with = [len(body["input_ids"]) - len(PROMPT) for body in on_fake.server.told("/generate")]
    assert begun_with[0] == 0 < begun_with[1]
    assert on_fake.engine.stats().num_interruptions == len(begun_with) - 1


@pytest.mark.parametrize(("status", "kind"), [(400, ConfigError), (500, RuntimeError)])
def test_an_abort_for_an_error_is_raised_with_the_servers_message(
    connect: Connect, status: int, kind: type[Exception]
) -> None:
    on_fake = connect(Aborting(1, status_code=status, message="out of memory"))
    with pytest.raises(kind, match="out of memory") as raised:
        list(on_fake.engine.generate(request()))
    assert isinstance(raised.value, ConfigError) is (status == 400)


def test_a_server_that_aborts_what_cannot_go_on_is_no_endless_loop(connect: Connect) -> None:
    """Under a penalty every part begins anew: its tokens are no progress."""
    on_fake = connect(Aborting(100))
    with pytest.raises(RuntimeError, match="breaks off again and again"):
        list(on_fake.engine.generate(request(repetition_penalty=1.5)))


def test_a_pause_that_aborts_ends_samples_with_what_they_have(connect: Connect) -> None:
    on_fake = connect(FakeServer(delay_s=0.01))
    generation = on_fake.engine.generate(request())
    while not any(run.num_tokens for run in on_fake.engine.samples.in_progress):
        pass
    on_fake.engine.update_weights(PauseGeneration(0, "abort"))
    (sample,) = generation
    on_fake.engine.update_weights(ContinueGeneration(0))
    assert sample.finish_reason == "abort"
    assert sample.token_ids == whole()[: len(sample.token_ids)] != ()
    assert on_fake.engine.stats().num_interruptions == 0


class Garbling(FakeServer):
    """Ends its first stream after five chunks with ``data``."""

    def __init__(self, data: bytes) -> None:
        super().__init__(incremental=True)
        self.data = data

    async def _answer(self, request: web.Request, body: Body, chunks: AsyncIterator[Body], status: int = 200) -> Any:
        if len(self.told("/generate")) > 1:
            return await super()._answer(request, body, chunks, status)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(5):
            await response.write(b"data: " + json.dumps(await anext(chunks)).encode() + b"\n\n")
        await response.write(self.data)
        await asyncio.sleep(0)
        return response


@pytest.mark.parametrize(
    "data",
    [
        b'data: {"output_ids": [1,2\n\n',
        b'data: {"output_ids": [1,2',
        b"data: [1]\n\n",
        b'data: {"output_ids": [1], "meta_info": 3}\n\n',
        b"data: " + b"[" * 100_000 + b"\n\n",
        b'data: {"error": {"message": "scheduler hit an exception", "code": 500}}\n\n',
        b"data: [DONE]\n\n",
    ],
    ids=["cut", "torn", "array", "meta", "nested", "error", "done"],
)
def test_a_garbled_stream_is_begun_again_from_what_was_whole(connect: Connect, data: bytes) -> None:
    on_fake = connect(Garbling(data))
    (sample,) = on_fake.engine.generate(request())
    assert (sample.token_ids, sample.finish_reason) == (whole(), "length")
    assert [len(body["input_ids"]) for body in on_fake.server.told("/generate")] == [3, 3 + 13]


def chunk(ids: list[int], num_total: object, reason: Body | None = None, **meta: Any) -> Body:
    triples = [[-1.0, token, None] for token in ids]
    base = {"id": "rid", "completion_tokens": num_total, "output_token_logprobs": triples, "finish_reason": reason}
    return {"output_ids": ids, "meta_info": {**base, "weight_version": "2", **meta}}


def part() -> Part:
    """A part that has two tokens of at most eight."""
    part = Part("rid", VOCAB_SIZE, 8)
    part.take(chunk([1, 2], 2))
    return part


END = {"type": "length", "length": 3}
COUNTS = {
    "spec_verify_ct": 2,
    "spec_num_correct_drafts": 3,
    "spec_num_proposed_drafts": 6,
    "spec_correct_drafts_histogram": [0, 1, 1],
}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (chunk([3], 9), "1 tokens and 1 logprobs make 9 after 2"),
        (chunk([3], None), "completion_tokens is None"),
        (chunk([3], 3.0), "completion_tokens is 3.0"),
        (chunk([3], True), "completion_tokens is True"),
        (chunk([3], 1), "1 tokens and 1 logprobs make 1 after 2"),
        (chunk([3], 3, output_token_logprobs=[]), "1 tokens and 0 logprobs"),
        (chunk([3], 3, output_token_logprobs=None), "output_token_logprobs is"),
        (chunk([3], 3, output_token_logprobs=[[None, 3, None]]), "token 3 has the logprob None"),
        (chunk([3], 3, output_token_logprobs=[[math.nan, 3, None]]), "token 3 has the logprob nan"),
        (chunk([3], 3, output_token_logprobs=[[-math.inf, 3, None]]), "token 3 has the logprob -inf"),
        (chunk([3], 3, output_token_logprobs=[[-3.4e38, 3, None]]), "token 3 has the logprob -3.4e"),
        (chunk([3], 3, output_token_logprobs=[[0.75, 3, None]]), "token 3 has the logprob 0.75"),
        (chunk([3], 3, output_token_logprobs=[[10**400, 3, None]]), "token 3 has the logprob 1000"),
        (chunk([3], 3, output_token_logprobs=[[-(10**400), 3, None]]), "token 3 has the logprob -1000"),
        (chunk([3], 3, output_token_logprobs=[[-1.0, 4, None]]), "the logprob of another"),
        (chunk([3], 3, output_token_logprobs=[-1.0]), "the logprob of another"),
        (chunk([257], 3), "token 257 is not of the vocabulary, which has 257"),
        (chunk([-1], 3), "token -1 is not of the vocabulary"),
        (chunk([True], 3), "token True is not of the vocabulary"),
        (chunk([3] * 7, 9), "9 tokens came where 8 were asked for"),
        (chunk([3] * 7, 9, END), "9 tokens came where 8 were asked for"),
        (chunk([3], 3, id="other"), "a chunk of request 'other'"),
        (chunk([3], 3, "stop"), "finish_reason is 'stop'"),  # type: ignore[arg-type]
        (chunk([3], 3, END, weight_versions=[{"start": -1, "version": "1"}]), "start is -1"),
        (chunk([3], 3, END, weight_versions=[3]), "weight_versions are"),
        (chunk([3], 3, weight_version=None), "weight_version is None"),
        (chunk([3], 3, weight_version="step-100"), "weight_version is 'step-100', which this run has not given"),
        (chunk([3], 3, END, weight_versions=[{"start": 0, "version": "-1"}]), "weight_version is '-1'"),
        (chunk([3], 3, END, **{**COUNTS, "spec_verify_ct": -2}), "spec_verify_ct is -2"),
        (chunk([3], 3, END, **{**COUNTS, "spec_verify_ct": None}), "spec_verify_ct is None"),
        (chunk([3], 3, END, **{**COUNTS, "spec_num_correct_drafts": None}), "spec_num_correct_drafts is None"),
        (chunk([3], 3, END, **{**COUNTS, "spec_num_correct_drafts": 7}), "contradict their histogram"),
        (chunk([3], 3, END, **{**COUNTS, "spec_correct_drafts_histogram": [0, 0, 9]}), "contradict their histogram"),
        (chunk([3], 3, END, **{**COUNTS, "spec_correct_drafts_histogram": [0, -1]}), "spec_correct_drafts_histogram"),
        ({"output_ids": [3]}, "without meta_info"),
        (["a"], "without meta_info"),
    ],
)
def test_a_chunk_that_cannot_be_true_adds_nothing(data: Any, message: str) -> None:
    has = part()
    before = replace(has, token_ids=list(has.token_ids), logprobs=list(has.logprobs), spans=list(has.spans))
    with pytest.raises(ProtocolError, match=message):
        has.take(data)
    assert has == before


@pytest.mark.parametrize(
    ("data", "token_ids"),
    [
        (chunk([3], 3), [1, 2, 3]),
        (chunk([1, 2, 3, 4], 4), [1, 2, 3, 4]),
        (chunk([], 2, output_token_logprobs=None), [1, 2]),
        (chunk([3], 3, output_token_logprobs=[[1e-7, 3, None]]), [1, 2, 3]),
        (chunk([3], 3, END, **COUNTS), [1, 2, 3]),
        (chunk([3], 9, {"type": "abort"}), [1, 2]),
        (chunk([3] * 7, 9, {"type": "abort"}), [1, 2, *[3] * 7]),
        ({"text": "", "meta_info": {"finish_reason": {"type": "abort"}}}, [1, 2]),
    ],
)
def test_a_chunk_has_new_tokens_or_all_of_them_and_an_abort_may_have_any_number(
    data: Body, token_ids: list[int]
) -> None:
    has = part()
    has.take(data)
    assert (has.token_ids, len(has.logprobs)) == (token_ids, len(token_ids))


def test_nothing_is_added_after_the_final_chunk() -> None:
    has = part()
    has.take(chunk([3], 3, END))
    with pytest.raises(ProtocolError, match="after the final one"):
        has.take(chunk([4], 4))


def test_an_unknown_abort_has_status_0() -> None:
    assert Patience().delay_s(Aborted("url", 0, "Abort"), False) == 1.0
