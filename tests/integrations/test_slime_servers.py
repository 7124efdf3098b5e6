"""Beside slime's own calls the plug-in runs a canary on its servers, and feeds n-gram servers with replies."""

from __future__ import annotations

import asyncio
import logging
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from slime.observability.rollout_metrics import log_rollout_data
from slime.rollout.sglang_rollout import generate_and_rm_group
from slime.utils.types import Sample, Status

from rollout.sglang_engine.fake import FakeServer, serving
from rollout.sglang_engine.reply_corpus import PREFIX
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.integrations.plugin import Plugin
from slime_spec.integrations.reply_feed import Finished, ReplyFeed, key_of, reply_of
from slime_spec.integrations.servers import Servers
from slime_spec.integrations.settings import PluginSettings
from tests.support.tiny_policy import make_tiny_policy

Args = Callable[..., Namespace]
Logged = list[dict[str, Any]]
SAMPLING = {"temperature": 0.0, "max_new_tokens": 10, "ignore_eos": True}
WAIT_S = 30.0


def rollout(step: int, args: Namespace, prompts: list[str]) -> list[Sample]:
    groups = [[Sample(index=i, group_index=at, prompt=each) for i in range(2)] for at, each in enumerate(prompts)]

    async def all_groups() -> list[list[Any]]:
        return await asyncio.gather(*(generate_and_rm_group(args, group, SAMPLING) for group in groups))

    samples = [sample for group in asyncio.run(all_groups()) for sample in group]
    log_rollout_data(step, args, samples, None, 1.0)
    return samples


def test_each_rollout_begins_with_a_canary_of_earlier_prompts(
    plugin: Plugin, logged: Logged, slime_args: Args, caplog: pytest.LogCaptureFixture
) -> None:
    server = FakeServer()
    with serving(server) as address:
        args = slime_args(address, slime_spec={"canary_prompts": 2, "canary_tokens": 7})
        for step in range(4):
            server.accepted = 2 if step < 3 else 0  # the draft is lost before the fourth
            rollout(step, args, ["abcd", "bcde", "cdef"])
    lengths = [each.get("sync/canary_accept_length") for each in logged]
    assert lengths == [None, 3.0, 3.0, 1.0]  # 1 + accepted drafts per round; the first rollout knows no prompt yet
    assert "ALARM drafts are refused accepted_per_round=0.000 mean=2.000" in caplog.text
    canaries = [body for path, body in server.calls if path == "/generate" and body["rid"].startswith("canary-")]
    assert len(canaries) == 3 * 2
    assert all(body["sampling_params"]["temperature"] == 0.0 for body in canaries)
    assert all(body["sampling_params"]["max_new_tokens"] == 7 for body in canaries)


def test_a_router_that_is_gone_costs_the_canary_and_nothing_else(
    plugin: Plugin, logged: Logged, slime_args: Args, caplog: pytest.LogCaptureFixture
) -> None:
    servers = Servers("http://127.0.0.1:9", PluginSettings())
    servers.began(Sample())
    assert servers.measured() == {}
    assert "the router did not list its servers" in caplog.text
    servers.close()


def test_servers_are_those_that_the_settings_name(plugin: Plugin, logged: Logged, slime_args: Args) -> None:
    first, second = FakeServer(), FakeServer()
    second.accepted = 0
    with serving(first) as one, serving(second) as other:
        args = slime_args(one, slime_spec={"servers": [one, other], "canary_prompts": 1, "canary_tokens": 7})
        for step in range(2):
            rollout(step, args, ["abcd"])
    # 7 tokens: 2 rounds of 3 at the first, 6 of 1 at the second, 4 drafts accepted in 8 rounds.
    assert logged[1]["sync/canary_accept_length"] == 1.5
    assert logged[1]["sync/canary_accept_length_min"] == 1.0


def texts_of(server: FakeServer) -> list[str]:
    return [text for name, texts in server.corpora.items() if name.startswith(PREFIX) for text in texts]


def wait_for(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.fixture
def policy(tmp_path: Path) -> str:
    return str(make_tiny_policy(tmp_path / "policy"))


def test_replies_of_the_last_step_are_what_an_ngram_server_drafts_from(
    policy: str, plugin: Plugin, logged: Logged, slime_args: Args
) -> None:
    first, second = FakeServer(delay_s=0.2), FakeServer()
    with serving(first) as one, serving(second) as other:
        settings = {"servers": [one, other], "canary_prompts": 0}
        args = slime_args(one, sglang_speculative_algorithm="NGRAM", hf_checkpoint=policy, slime_spec=settings)
        (sample, *_) = rollout(0, args, ["abcd"])
        rollout(1, args, ["abcd"])
        wait_for(lambda: bool(texts_of(first)) and bool(texts_of(second)))
        whole = Tokenizer.load(policy).decode(sample.tokens, skip_special=False)
        assert len(sample.tokens) == 14
        assert set(texts_of(first)) == set(texts_of(second)) == {whole}


@pytest.mark.parametrize(
    "changed", [{"slime_spec": {"feed_replies": False}}, {"sglang_speculative_algorithm": "EAGLE"}]
)
def test_servers_that_draft_otherwise_are_fed_nothing(
    changed: dict[str, Any], policy: str, plugin: Plugin, logged: Logged, slime_args: Args
) -> None:
    server = FakeServer()
    with serving(server) as address:
        args = slime_args(address, **{"sglang_speculative_algorithm": "NGRAM", "hf_checkpoint": policy, **changed})
        for step in range(2):
            rollout(step, args, ["abcd"])
    assert "/add_external_corpus" not in [path for path, _ in server.calls]


def test_a_feed_forgets_prompts_that_no_sample_runs_for_and_replies_that_are_not_whole() -> None:
    feed = ReplyFeed(str)
    sample = Sample(prompt="ab", tokens=[97, 98, 5, 6], response_length=2, weight_versions=["3"])
    key, whole = key_of(sample), reply_of(sample)
    assert whole is not None
    sample.status = Status.ABORTED
    assert reply_of(sample) is None
    assert reply_of(Sample(prompt="ab", tokens=[97, 98])) is None

    async def run() -> None:
        await feed.began(key)
        await feed.ended(key, [whole])
        await feed.began(key)
        await feed.ended(key, [])  # the generation failed, or goes on later

    asyncio.run(run())
    (kept,) = feed._history.of((97, 98))
    assert (kept.token_ids, kept.weight_version) == ((5, 6), 3)
    assert (feed._fed, feed._num_running) == ({}, {})


class Heard(ReplyFeed):
    """Notes what it is told, when the loop comes to it."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(str)
        self.told: list[tuple[bytes, list[Finished] | None]] = []
        self.error = error

    async def began(self, key: bytes) -> None:
        self.told.append((key, None))
        if self.error is not None:
            raise self.error

    async def ended(self, key: bytes, replies: Sequence[Finished]) -> None:
        self.told.append((key, list(replies)))


def test_a_feed_hears_of_a_sample_as_it_was_whatever_the_framework_does_with_it_next() -> None:
    feed = Heard()
    servers = Servers("http://127.0.0.1:9", PluginSettings(), feed)
    sample = Sample(prompt="ab", weight_versions=["3"])
    servers.began(sample)
    sample.prompt, sample.tokens, sample.response_length = "chat of ab", [97, 98, 5, 6], 2
    servers.ended(sample, [sample])
    sample.tokens, sample.response_length, sample.status = [1], 0, Status.ABORTED
    wait_for(lambda: len(feed.told) == 2)
    servers.close()
    key = key_of(Sample(prompt="ab"))
    assert feed.told == [(key, None), (key, [Finished((97, 98), (5, 6), 3)])]


def test_a_feed_that_fails_is_told_of_once_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    feed = Heard(KeyError("a prompt"))
    servers = Servers("http://127.0.0.1:9", PluginSettings(), feed)
    servers.began(Sample(prompt="ab"))
    wait_for(lambda: servers._feed is None)
    other = Sample(prompt="ab")
    servers.began(other)
    servers.ended(other, [other])
    servers.close()
    assert len(feed.told) == 1
    (told,) = [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR]
    assert told == "servers are given no replies from now on reason=KeyError: 'a prompt'"
