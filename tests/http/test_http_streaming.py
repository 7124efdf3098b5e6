"""Streams: SGLang's framing, chunks that add up to the plain answer, text that never has to be taken back."""

import asyncio
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from threading import Event
from typing import Any, SupportsIndex

import pytest
import requests
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout.embedded.http.answers import AnswerWriter, GrowingText, StopMatch, borders, response_text
from rollout.embedded.http.generations import Finished, NewTokens, gathered
from rollout.embedded.http.running import LARGE_TEXT_BYTES
from rollout.embedded.http.sampling import Sampling
from rollout.embedded.loop_thread import Refused
from rollout.embedded.request import OnProgress, Progress
from rollout.embedded.verification.verifier import Verified, VerifyRow
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.tree import Config
from slime_spec.interfaces import Generation
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams, SpecCounters
from tests.support.http_server import TIMEOUT_S, Served, served

GREEDY = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
PROMPT = "the cat sat on the cat sat on"


@pytest.fixture(scope="module")
def incremental(config: Config) -> Iterator[Served]:
    with served(config, incremental_streaming=True) as running:
        yield running


def test_chunks_hold_everything_so_far_and_the_last_is_the_plain_answer(server: Served) -> None:
    body = {"text": PROMPT, "sampling_params": GREEDY, "return_logprob": True, "rid": "s"}
    plain = server.generate(**body)
    chunks = server.stream(**body)
    assert len(chunks) > 2
    for chunk, following in pairwise(chunks):
        count = len(chunk["output_ids"])
        assert following["output_ids"][:count] == chunk["output_ids"]
        assert following["text"].startswith(chunk["text"])
        assert chunk["meta_info"]["completion_tokens"] == count
        assert chunk["meta_info"]["output_token_logprobs"] == plain["meta_info"]["output_token_logprobs"][:count]
        assert chunk["meta_info"]["finish_reason"] is None or following is chunks[-1]
        assert chunk["meta_info"]["weight_version"] == "default"
    last = chunks[-1]
    assert (last["text"], last["output_ids"]) == (plain["text"], plain["output_ids"])
    timeless = [{**each["meta_info"], "e2e_latency": 0, "cached_tokens": 0} for each in (last, plain)]
    assert timeless[0] == timeless[1]
    assert last["meta_info"]["cached_tokens"] == last["meta_info"]["prompt_tokens"] - 1  # all but the last were kept


def test_incremental_chunks_concatenate_to_the_plain_answer(incremental: Served) -> None:
    body = {"text": PROMPT, "sampling_params": GREEDY, "return_logprob": True}
    plain = incremental.generate(**body)
    chunks = incremental.stream(**body)
    assert len(chunks) > 2
    assert "".join(chunk["text"] for chunk in chunks) == plain["text"]
    assert [token for chunk in chunks for token in chunk["output_ids"]] == plain["output_ids"]
    logprobs = [triple for chunk in chunks for triple in chunk["meta_info"]["output_token_logprobs"]]
    assert logprobs == plain["meta_info"]["output_token_logprobs"]


def test_a_stream_that_the_engine_refuses_to_go_on_with_says_so_and_ends(
    own_server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, first_has_spoken = own_server.engine.generate, Event()

    def once(request: GroupRequest, on_progress: OnProgress, record: None) -> Generation:
        if request.group_id == "a_1":
            assert first_has_spoken.wait(TIMEOUT_S)
            raise Refused("the engine is offloaded")

        def speak(progress: Progress) -> None:
            on_progress(progress)
            first_has_spoken.set()

        return generate(request, speak)

    monkeypatch.setattr(own_server.engine, "generate", once)
    prompts = [PROMPT, PROMPT]
    chunks = own_server.stream(text=prompts, rid="a", sampling_params={**GREEDY, "max_new_tokens": 30_000})
    assert chunks[0]["index"] == 0
    assert chunks[-1] == {"error": {"message": "the engine is offloaded", "type": "internal_error", "code": 503}}
    own_server.wait_for(lambda state: state["num_running_reqs"] == 0)


def test_an_error_in_mid_stream_ends_the_stream_with_its_event_and_no_second_head(
    own_server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(AnswerWriter, "finished", fail)
    chunks = own_server.stream(text=PROMPT, sampling_params={**GREEDY, "max_new_tokens": 50})
    assert len(chunks) > 1
    assert chunks[-1]["error"] == {
        "message": "the server failed; its log says why",
        "type": "internal_error",
        "code": 500,
    }
    monkeypatch.undo()
    assert own_server.generate(text=PROMPT, sampling_params=GREEDY)["output_ids"]


def test_an_answer_that_has_begun_is_cut_off_and_not_answered_twice(
    own_server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever handler fails after its head was sent: here the stream's end, which no event can tell of any more."""

    async def fail(*_: object) -> None:
        raise KeyError("a mistake of ours")

    monkeypatch.setattr("aiohttp.web.StreamResponse.write_eof", fail)
    body = {"text": PROMPT, "sampling_params": GREEDY, "stream": True}
    received: list[bytes] = []
    response = requests.post(f"{own_server.url}/generate", json=body, timeout=TIMEOUT_S, stream=True)
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        received.extend(response.iter_content(None))
    assert b"[DONE]" in b"".join(received)
    assert b"HTTP/1.1" not in b"".join(received)


def test_a_request_whose_logits_are_not_finite_is_told_so_and_the_server_serves_on(
    own_server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case audit/13, of the target's logits: an answer of its own, in mid-stream an event; never a token of it."""
    core = own_server.engine._core
    verify = core.verifier

    def broken(logits: torch.Tensor, rows: Sequence[VerifyRow]) -> list[Verified]:
        meets_it = [row.params.top_k == 7 and row.num_generated >= 3 for row in rows]
        return [
            each._replace(logprobs=[math.nan] * len(each.logprobs)) if meets else each
            for meets, each in zip(meets_it, verify(logits, rows), strict=True)
        ]

    monkeypatch.setattr(core, "verifier", broken)
    body = {"text": PROMPT, "sampling_params": {**GREEDY, "temperature": 1.0, "top_k": 7}}
    status, answer = own_server.post("/generate", body)
    assert (status, answer["error"]["code"]) == (500, 500)
    assert "logits are not finite numbers at token" in answer["error"]["message"]
    *chunks, error = own_server.stream(**body)
    assert all(0 < len(chunk["output_ids"]) < 24 for chunk in chunks)
    assert "logits are not finite numbers at token" in error["error"]["message"]
    assert len(own_server.generate(text=PROMPT, sampling_params=GREEDY)["output_ids"]) == 24


def test_a_large_text_keeps_no_other_request_waiting(own_server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, has_answered = Tokenizer.encode, Event()

    def slow(tokenizer: Tokenizer, text: str, special: bool = True) -> tuple[int, ...]:
        if len(text) > LARGE_TEXT_BYTES:
            assert has_answered.wait(TIMEOUT_S)
        return encode(tokenizer, text, special)

    monkeypatch.setattr(Tokenizer, "encode", slow)
    with ThreadPoolExecutor(1) as client:
        # Longer than the context: what matters is the time until that is known.
        large = client.submit(own_server.post, "/generate", {"text": "a" * 45_000, "sampling_params": GREEDY})
        assert own_server.generate(text=PROMPT, sampling_params=GREEDY)["output_ids"]
        assert not large.done()
        has_answered.set()
        assert large.result()[0] == 400


def test_an_engine_whose_loop_has_ended_is_unavailable_to_every_call(own_server: Served) -> None:
    with pytest.raises(ZeroDivisionError):
        own_server.engine._thread.call(lambda: 1 / 0)
    for path, body in [
        ("/generate", {"text": PROMPT, "sampling_params": GREEDY}),
        ("/pause_generation", {"mode": "retract"}),
        ("/weights_checker", {"action": "checksum"}),
    ]:
        status, answer = own_server.post(path, body)
        assert (status, answer["error"]["type"]) == (503, "unavailable_error"), path
    assert own_server.get("/health_generate")[0] == 503


def test_a_stop_string_never_shows_in_a_stream(incremental: Served) -> None:
    whole = incremental.generate(text=PROMPT, sampling_params=GREEDY)["text"]
    stop = whole[6:10]
    body = {"text": PROMPT, "sampling_params": {**GREEDY, "stop": stop}}
    chunks = incremental.stream(**body)
    assert "".join(chunk["text"] for chunk in chunks) == whole[: whole.index(stop)]
    assert chunks[-1]["meta_info"]["finish_reason"]["matched"] == stop


def test_the_chunks_of_a_batch_say_which_answer_they_belong_to(server: Served) -> None:
    params = {**GREEDY, "n": 2, "temperature": 1.0, "sampling_seed": 3}
    body = {"text": [PROMPT, "1 2 3 1 2 3"], "sampling_params": params}
    plain = server.generate(**body)
    lasts = {chunk["index"]: chunk for chunk in server.stream(**body)}
    assert sorted(lasts) == [0, 1, 2, 3]
    assert [lasts[index]["output_ids"] for index in range(4)] == [answer["output_ids"] for answer in plain]


def test_an_interval_makes_chunks_rarer(server: Served) -> None:
    every = server.stream(text=PROMPT, sampling_params=GREEDY)
    rare = server.stream(text=PROMPT, sampling_params={**GREEDY, "stream_interval": 10})
    assert len(rare) < len(every)
    sizes = [len(chunk["output_ids"]) for chunk in rare]
    assert all(later - earlier >= 10 for earlier, later in zip([0, *sizes], sizes[:-1], strict=False))
    assert rare[-1]["output_ids"] == every[-1]["output_ids"]


def test_a_stream_that_cannot_run_is_refused_with_its_status(server: Served) -> None:
    body = {"text": PROMPT, "sampling_params": {"top_p": 0}, "stream": True}
    response = requests.post(f"{server.url}/generate", json=body, timeout=60)
    assert response.status_code == 400
    assert "sampling_params.top_p" in response.json()["error"]["message"]


TEXTS = st.text(st.sampled_from("ab €ü"), min_size=1, max_size=12)


@given(text=TEXTS, sizes=st.lists(st.integers(1, 4), min_size=40, max_size=40), stops=st.lists(TEXTS, max_size=2))
def test_growing_text_never_takes_back_what_it_showed(
    policy_tokenizer: Tokenizer, text: str, sizes: Sequence[int], stops: list[str]
) -> None:
    """Characters of several bytes arrive in pieces; a stop string may begin anywhere."""
    sampling = Sampling(SamplingParams(stop=tuple(stops)), 1, None, True, trim_stop=True, stream_interval=1)
    growing = GrowingText(policy_tokenizer, sampling, eos_token_ids=())
    ids = policy_tokenizer.encode(text)
    found = [text.index(stop) + len(stop) for stop in stops if stop in text]
    if found:  # generation ends with the token that completes a stop string
        ids = policy_tokenizer.encode(text[: min(found)])
    matched = next((stop for stop in stops if stop in policy_tokenizer.decode(ids)), None)
    reason = "length" if matched is None else "stop"
    sample = GeneratedSample("g", 0, ids, (0.0,) * len(ids), reason, 0, 1, matched_stop=matched)
    final = response_text(policy_tokenizer, sample, sampling)
    position, shown = 0, ""
    for size in sizes:
        now = growing.add(ids[position : position + size])
        assert now.startswith(shown)
        assert final.startswith(now) or (matched is not None and now.startswith(final[: len(now)]))
        position, shown = position + size, now
    if matched is None and not any(text.endswith(stop[:n]) for stop in stops for n in range(1, len(stop))):
        assert shown == final


@given(stop=st.text("ab", min_size=1, max_size=7), added=st.lists(st.text("ab", max_size=5), max_size=8))
def test_a_stop_match_is_the_longest_end_of_the_text_that_begins_the_stop_string(stop: str, added: list[str]) -> None:
    match, text = StopMatch(stop), ""
    for part in added:
        end = match.find(part)
        if stop in text + part:
            assert len(text) + (end or 0) == (text + part).index(stop) + len(stop)
            return
        text += part
        assert end is None
        assert match.length == max(length for length in range(len(stop)) if text.endswith(stop[:length]))


class CountedText(str):
    """Counts how often its characters are looked at, one at a time."""

    looks = 0

    def __getitem__(self, index: SupportsIndex | slice) -> str:
        type(self).looks += 1
        return super().__getitem__(index)


def test_a_streamed_character_costs_the_same_whatever_the_stop_strings() -> None:
    """Case audit/03: each chunk was compared with every beginning of every stop string, 17 ms for 32 long strings."""
    stop = CountedText("a" * 1000 + "b")
    match = StopMatch(stop)
    assert len(borders(stop)) == 1001
    CountedText.looks = 0
    for _ in range(3000):
        assert match.find("a") is None
    assert match.length == 1000
    assert CountedText.looks <= 4 * 3000


def test_samples_of_a_request_share_its_stop_tokens(policy_tokenizer: Tokenizer) -> None:
    """Case audit/03: each sample of a stream held a set of its own, gigabytes for a vocabulary of stop tokens."""
    ids = policy_tokenizer.encode("AZabz")
    eos, *stops = ids[2:]
    params = SamplingParams(stop_token_ids=tuple(stops))
    sampling = Sampling(params, 2, None, True, trim_stop=True, stream_interval=1)
    first, second = (GrowingText(policy_tokenizer, sampling, eos_token_ids={eos}) for _ in range(2))
    assert {id(enders) for enders in (first._cut[0], second._cut[0])} == {id(sampling.stop_token_ids)}
    kept = replace(sampling, trim_stop=False)
    assert (first.add(ids), second.add(ids[:2])) == ("AZ", "AZ")
    assert GrowingText(policy_tokenizer, kept, eos_token_ids={eos}).add(ids) == "AZabz"


@pytest.fixture(scope="module")
def policy_tokenizer(config: Config) -> Tokenizer:
    return Tokenizer.load(config.model.hf_checkpoint)


def test_a_slow_reader_gets_all_that_a_sample_gained_at_once_and_in_order() -> None:
    """Chunks hold everything so far: one for each round of a long reply would cost the square of its length."""
    first, other = Progress(0, (1, 2), (-0.1, -0.2)), Progress(1, (7,), (-0.7,))
    done = Finished(0, GeneratedSample("g", 0, (1, 2, 3), (-0.1, -0.2, -0.3), "length", 0, 1, SpecCounters(), 0.0))
    error = RuntimeError("the engine has ended")

    async def read() -> list[object]:
        queue: asyncio.Queue[Any] = asyncio.Queue()
        for event in (NewTokens(0, first), NewTokens(0, other), NewTokens(0, Progress(0, (3,), (-0.3,))), done, error):
            queue.put_nowait(event)
        found: list[object] = [*await gathered(queue)]
        asyncio.get_running_loop().call_soon(queue.put_nowait, NewTokens(1, other))
        return [*found, *await gathered(queue)]

    whole = NewTokens(0, Progress(0, (1, 2, 3), (-0.1, -0.2, -0.3)))
    assert asyncio.run(read()) == [whole, NewTokens(0, other), done, error, NewTokens(1, other)]
