"""Generating through a server: what arrives, whole or in parts, and what is refused before it is sent."""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from rollout.sglang_engine.engine import Offloaded
from rollout.sglang_engine.fake import FakeServer, next_token
from rollout.sglang_engine.sample import GrowingSample, Reading, sampling_fields
from slime_spec.config.tree import Config, ModelConfig, SpeculativeConfig
from slime_spec.errors import ConfigError
from slime_spec.types import GroupRequest, SamplingParams, SpecCounters
from slime_spec.weights.messages import ContinueGeneration, PauseGeneration
from tests.sglang.conftest import Connect, OnFake
from tests.support.chat_templates import SPECIALS, save_tokenizer

PROMPT = (5, 6, 7)


def expected(num_tokens: int) -> tuple[int, ...]:
    ids: list[int] = []
    for position in range(num_tokens):
        ids.append(next_token(ids[-1] if ids else PROMPT[-1], len(PROMPT) + position))
    return tuple(ids)


@pytest.mark.parametrize("incremental", [False, True])
def test_samples_arrive_whole_however_the_server_streams(connect: Connect, incremental: bool) -> None:
    samples = connect(FakeServer(incremental=incremental)).generate(20, num_samples=3)
    assert [sample.sample_index for sample in samples] == [0, 1, 2]
    for sample in samples:
        assert sample.token_ids == expected(20)
        assert sample.logprobs == tuple(-0.5 - token / 100 for token in sample.token_ids)
        assert (sample.finish_reason, sample.num_prompt_tokens, sample.weight_version) == ("length", 3, 0)
        assert sample.version_spans == ()
        assert sample.spec == SpecCounters(7, 21, (0, 0, 7), 21, num_steps=3)
        assert sample.draft_version == 0


def test_every_sample_is_a_request_with_its_own_seed_and_the_params(connect: Connect) -> None:
    on_fake = connect()
    on_fake.generate(4, num_samples=2, temperature=0.5, top_p=0.9, stop=("x",), logit_bias=((3, 1.5),), ignore_eos=True)
    first, second = on_fake.server.told("/generate")
    assert [body["sampling_params"].pop("sampling_seed") for body in (first, second)] == [0, 1]
    assert first["sampling_params"] == {
        "max_new_tokens": 4,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.0,
        "ignore_eos": True,
        "stop": ["x"],
        "logit_bias": {"3": 1.5},
    }
    assert first["input_ids"] == list(PROMPT)
    assert first["return_logprob"] is True
    assert first["rid"] != second["rid"]


class RefusesAborts(FakeServer):
    async def _abort(self, request: web.Request) -> web.Response:
        return web.json_response({"error": "not now"}, status=500)


def test_a_refused_abort_lets_its_sample_run_on_and_blames_no_prompt(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    on_fake = connect(RefusesAborts(delay_s=0.01))
    generation = on_fake.engine.generate(GroupRequest("group", PROMPT, (1,), SamplingParams(max_new_tokens=60)))
    time.sleep(0.1)
    generation.abort()
    (sample,) = generation
    assert sample.token_ids == expected(60)
    assert "runs on to its end reason=/abort_request was refused (500): not now" in caplog.text


def test_an_abort_keeps_what_there_is(connect: Connect) -> None:
    on_fake = connect(FakeServer(delay_s=0.02))
    generation = on_fake.engine.generate(GroupRequest("long", PROMPT, (1, 2), SamplingParams(max_new_tokens=400)))
    time.sleep(0.3)
    generation.abort()
    for sample in generation:
        assert sample.finish_reason == "abort"
        assert 0 < len(sample.token_ids) < 400
        assert sample.token_ids == expected(len(sample.token_ids))
        assert len(sample.logprobs) == len(sample.token_ids)


def test_a_sample_that_waits_through_a_pause_goes_on(connect: Connect) -> None:
    on_fake = connect(FakeServer(delay_s=0.01))
    generation = on_fake.engine.generate(GroupRequest("paused", PROMPT, (1,), SamplingParams(max_new_tokens=60)))
    time.sleep(0.05)
    on_fake.engine.update_weights(PauseGeneration(0, "in_place"))
    time.sleep(0.05)
    on_fake.engine.update_weights(ContinueGeneration(0))
    assert [sample.token_ids for sample in generation] == [expected(60)]


def test_a_response_across_versions_says_where_each_begins(connect: Connect) -> None:
    on_fake = connect(FakeServer(delay_s=0.01))
    generation = on_fake.engine.generate(GroupRequest("spans", PROMPT, (1,), SamplingParams(max_new_tokens=90)))
    time.sleep(0.1)
    on_fake.server.weight_version = "4"
    (sample,) = generation
    assert [version for _, version in sample.version_spans] == [0, 4]
    assert sample.version_spans[0][0] == 0 < sample.version_spans[1][0] < 90
    assert sample.weight_version == 0


@pytest.mark.parametrize("generation", ["0.5.8", "0.5.9", "0.5.11", "0.5.20"])
def test_older_servers_are_read_too(connect: Connect, generation: str) -> None:
    (sample,) = connect(FakeServer(generation)).generate(20)
    assert (sample.spec.num_rounds, sample.spec.num_proposed, sample.spec.num_correct) == (7, 21, 14)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ((), {}, "at least one token"),
        ((5, 257), {}, "token ids from 0 to 256"),
        ((5,), {"stop_token_ids": (999,)}, "stop_token_ids"),
        ((5,), {"max_new_tokens": 600}, "prompt .1. plus max_new_tokens .600."),
        ((5,), {"advice_token_ids": (1, 2)}, "LOOKUP"),
        ((5,), {"speculative": False}, "for all of a server's requests or for none"),
    ],
)
def test_what_would_kill_the_server_or_lie_is_refused_before_it_is_sent(
    connect: Connect, prompt: tuple[int, ...], params: dict[str, Any], message: str
) -> None:
    on_fake = connect()
    with pytest.raises(ConfigError, match=message):
        on_fake.engine.generate(GroupRequest("bad", prompt, (1,), SamplingParams(**params)))
    assert on_fake.server.told("/generate") == []


def test_what_the_server_refuses_reaches_the_caller(connect: Connect, config: Config) -> None:
    """It keeps positions for drafts that nobody else counts."""
    on_fake = connect()
    on_fake.server.accepted = 0
    prompt = tuple([5] * 30)
    refused = on_fake.engine.generate(GroupRequest("edge", prompt, (1,), SamplingParams(max_new_tokens=482)))
    assert len(next(iter(refused)).token_ids) == 482
    request = GroupRequest("edge", prompt, (1,), SamplingParams(max_new_tokens=483))
    body = GrowingSample(request, 0, Reading(0, 3, True, 257))

    async def overlong() -> None:
        async for _ in on_fake.engine.client.stream(body.body("rid", "key")):
            pass

    with pytest.raises(RuntimeError, match="maximum context length"):
        on_fake.engine.server.loop.call(overlong())


def test_an_api_key_opens_the_server_and_its_absence_does_not(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY", "secret")
    assert len(connect(FakeServer(api_key="secret"), api_key_file="env:KEY").generate(3)[0].token_ids) == 3
    with pytest.raises(ConfigError, match=r"401.*--sglang-api-key-file"):
        connect(FakeServer(api_key="secret"))


def test_an_offloaded_engine_generates_nothing_and_one_that_generates_is_not_offloaded(connect: Connect) -> None:
    on_fake = connect(FakeServer(delay_s=0.01))
    running = on_fake.engine.generate(GroupRequest("busy", PROMPT, (1,), SamplingParams(max_new_tokens=30)))
    with pytest.raises(Offloaded, match="requests are running"):
        on_fake.engine.set_resident(False)
    list(running)
    on_fake.engine.set_resident(False)
    with pytest.raises(Offloaded):
        on_fake.generate(3)
    on_fake.engine.set_resident(True)
    assert on_fake.generate(3)[0].token_ids == expected(3)
    assert [path for path, _ in on_fake.server.calls if "memory" in path] == [
        "/release_memory_occupation",
        "/resume_memory_occupation",
    ]


def test_groups_generate_side_by_side(connect: Connect) -> None:
    on_fake = connect(FakeServer(delay_s=0.02))
    lengths: dict[int, int] = {}

    def run(number: int) -> None:
        request = GroupRequest(f"group{number}", PROMPT, (1, 2), SamplingParams(max_new_tokens=10 + number))
        lengths[number] = min(len(sample.token_ids) for sample in on_fake.engine.generate(request))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lengths == {number: 10 + number for number in range(6)}


def broken_sample(params: SamplingParams) -> GrowingSample:
    """Five tokens arrived, then the server died."""
    sample = GrowingSample(GroupRequest("g", PROMPT, (1,), params), 0, Reading(0, 3, True, 257))
    sample.body("rid", "key")
    triples = [[-1.0, token, None] for token in range(5)]
    meta = {"completion_tokens": 5, "output_token_logprobs": triples, "weight_version": "2", "finish_reason": None}
    sample.part.take({"output_ids": list(range(5)), "meta_info": meta})
    sample.break_off()
    return sample


def test_a_broken_sample_goes_on_from_its_tokens() -> None:
    body = broken_sample(SamplingParams(max_new_tokens=20, min_new_tokens=8)).body("next", "key")
    assert body["input_ids"] == [*PROMPT, 0, 1, 2, 3, 4]
    assert (body["sampling_params"]["max_new_tokens"], body["sampling_params"]["min_new_tokens"]) == (15, 3)


@pytest.mark.parametrize(
    ("params", "stops"), [({}, [2, 7]), ({"stop_token_ids": (5,)}, [2, 5, 7]), ({"ignore_eos": True}, None)]
)
def test_a_request_names_every_token_that_ends_a_reply(params: dict[str, Any], stops: list[int] | None) -> None:
    """A server may know fewer of them (case reports/02): it may run without a tokenizer."""
    request = GroupRequest("g", PROMPT, (1,), SamplingParams(**params))
    sample = GrowingSample(request, 0, Reading(0, 3, True, 257, frozenset({7, 2})))
    assert sample.body("rid", "key")["sampling_params"].get("stop_token_ids") == stops


def test_the_engine_knows_the_end_that_the_tokenizer_alone_names(
    connect: Connect, config: Config, tmp_path: Path
) -> None:
    shutil.copytree(config.model.hf_checkpoint, tmp_path / "target")
    save_tokenizer(tmp_path / "target", eos_token="<|im_end|>")
    on_fake = connect(FakeServer(), replace(config, model=ModelConfig(hf_checkpoint=str(tmp_path / "target"))))
    list(on_fake.engine.generate(GroupRequest("g", PROMPT, (1,), SamplingParams(max_new_tokens=3))))
    (body,) = on_fake.server.told("/generate")
    assert SPECIALS.index("<|im_end|>") in body["sampling_params"]["stop_token_ids"]


@pytest.mark.parametrize("params", [{"stop": ("a",)}, {"frequency_penalty": 0.5}, {"presence_penalty": 0.5}])
def test_it_starts_anew_where_going_on_would_bend_its_distribution(params: dict[str, Any]) -> None:
    body = broken_sample(SamplingParams(max_new_tokens=20, **params)).body("next", "key")
    assert body["input_ids"] == list(PROMPT)
    assert body["sampling_params"]["max_new_tokens"] == 20


def test_a_sample_that_broke_claims_no_acceptance_since_its_rounds_are_unknown() -> None:
    sample = broken_sample(SamplingParams(max_new_tokens=5))
    assert sample.is_complete
    finished = sample.finished(1.0, draft_version=1)
    assert finished.token_ids == (0, 1, 2, 3, 4)
    assert (finished.finish_reason, finished.weight_version, finished.spec) == ("length", 2, SpecCounters())


def test_a_sample_without_speculation_has_no_counters(connect: Connect, config: Config) -> None:
    on_fake = connect(FakeServer(), replace(config, speculative=SpeculativeConfig()))
    assert on_fake.engine.samples.draft_version is None
    assert sampling_fields(SamplingParams(), 0)["temperature"] == 1.0


def test_the_engine_reports_its_load(connect: Connect) -> None:
    on_fake: OnFake = connect(FakeServer(delay_s=0.02))
    generation = on_fake.engine.generate(GroupRequest("load", PROMPT, (1, 2), SamplingParams(max_new_tokens=60)))
    time.sleep(0.1)
    assert on_fake.engine.stats().num_running == 2
    list(generation)
    stats = on_fake.engine.stats()
    assert (stats.num_running, stats.kv_tokens_capacity, stats.resident) == (0, 4096, True)
