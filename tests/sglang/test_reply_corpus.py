"""An n-gram server is fed with the replies to the prompts that it generates for, and no sample depends on it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from rollout.sglang_engine.client import ServerGone, ServerRefused
from rollout.sglang_engine.fake import FakeServer, next_token
from rollout.sglang_engine.reply_corpus import ADD, LIST, MAX_REFUSALS, PREFIX, REMOVE, ReplyCorpus
from rollout.sglang_engine.reply_texts import CONTEXT_TOKENS, MAX_AGE_VERSIONS, ReplyTexts
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.tree import Config, SpeculativeConfig
from slime_spec.types import EarlierReply, GroupRequest, SamplingParams
from tests.sglang.conftest import Connect

PROMPT = (5, 6, 7)


def asked(*earlier: EarlierReply, prompt: tuple[int, ...] = PROMPT, num_samples: int = 1) -> GroupRequest:
    return GroupRequest("g", prompt, tuple(range(num_samples)), SamplingParams(max_new_tokens=20), earlier=earlier)


@pytest.fixture
def fed(config: Config) -> Config:
    return replace(config, speculative=SpeculativeConfig(algorithm="NGRAM", history=True, num_draft_tokens=4))


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30.0
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_texts_are_the_replies_of_groups_in_progress_behind_the_ends_of_their_prompts_the_newest_last() -> None:
    texts, long_prompt = ReplyTexts(), tuple(range(100, 100 + CONTEXT_TOKENS + 3))
    texts.begin("a", asked(EarlierReply((1, 2), 8), EarlierReply((3,), 9), num_samples=2))
    texts.begin("b", asked(EarlierReply((4,), 8), EarlierReply((), 9), prompt=long_prompt))
    texts.learn("b", [EarlierReply((9, 9), 7, sample_index=3)])
    texts.learn("gone", [EarlierReply((8,), 9, sample_index=3)])
    assert texts.num_fresh == 6
    context = long_prompt[3:]
    assert texts.take() == [(*PROMPT, 1, 2), (*context, 4), (*PROMPT, 3), (*context, 9, 9)]
    assert (texts.num_fresh, texts.num_taken) == (0, 5 + 4 + 2 * CONTEXT_TOKENS + 3)
    texts.sample_ended("a")
    texts.sample_ended("b")
    assert texts.take() == [(*PROMPT, 1, 2), (*PROMPT, 3)]
    texts.sample_ended("a")
    assert texts.take() == []


def test_of_too_many_tokens_those_of_the_oldest_weights_are_left_out_and_very_old_ones_always() -> None:
    replies = [EarlierReply((version, version), version) for version in (1, 2, 40, 41, MAX_AGE_VERSIONS + 1)]
    texts = ReplyTexts()
    texts.begin("a", asked(*replies, EarlierReply((0, 0), 3, sample_index=1)))
    assert [text[-1] for text in texts.take()] == [2, 40, 41, MAX_AGE_VERSIONS + 1, 0]
    bounded = ReplyTexts(max_tokens=3 * (len(PROMPT) + 2))
    bounded.begin("a", asked(*replies, EarlierReply((0, 0), 3, sample_index=1)))
    assert [text[-1] for text in bounded.take()] == [41, MAX_AGE_VERSIONS + 1, 0]


def test_a_server_gets_one_corpus_of_earlier_replies_and_a_new_one_of_siblings_too(
    connect: Connect, fed: Config
) -> None:
    left = {f"{PREFIX}of-an-earlier-run": ["x"], "the user's own": ["y"]}
    on = connect(FakeServer(delay_s=0.2), base=fed)
    on.server.corpora = dict(left)
    decode = Tokenizer.load(fed.model.hf_checkpoint).decode
    earlier, sibling = EarlierReply((10, 11, 12), 3), EarlierReply((20, 21, 22, 23), 4, sample_index=7)
    generation = on.engine.generate(asked(earlier))
    until(lambda: len(on.server.corpora) == 2 and f"{PREFIX}of-an-earlier-run" not in on.server.corpora)
    (first,) = set(on.server.corpora) - set(left)
    assert on.server.corpora[first] == [decode([*PROMPT, 10, 11, 12])]
    generation.learn([sibling])
    until(lambda: first not in on.server.corpora)
    (second,) = set(on.server.corpora) - set(left)
    assert on.server.corpora[second] == [decode([*PROMPT, 10, 11, 12]), decode([*PROMPT, 20, 21, 22, 23])]
    (sample,) = generation
    last, expected = PROMPT[-1], []
    for position in range(len(PROMPT), len(PROMPT) + 20):
        last = next_token(last, position)
        expected.append(last)
    assert list(sample.token_ids) == expected
    generation.learn([sibling])  # too late
    on.engine.generate(asked())
    assert len(on.server.told(ADD)) == 2


def test_a_server_without_the_calls_generates_all_the_same_and_is_asked_once(
    connect: Connect, fed: Config, caplog: pytest.LogCaptureFixture
) -> None:
    on = connect(FakeServer(delay_s=0.1), base=fed)
    on.server.has_corpora = False
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            (sample,) = on.engine.generate(asked(EarlierReply((10, 11, 12), 3)))
            until(lambda: on.server.heard.count(LIST) == 1)
            assert len(sample.token_ids) == 20
    assert on.server.heard.count(LIST) == 1
    assert [record.levelname for record in caplog.records if "took no corpus" in record.getMessage()] == ["WARNING"]


def test_a_server_that_is_not_to_be_fed_is_not(connect: Connect, fed: Config) -> None:
    on = connect(base=replace(fed, speculative=replace(fed.speculative, history=None)))
    generation = on.engine.generate(asked(EarlierReply((10, 11, 12), 3)))
    generation.learn([EarlierReply((9,), 3, 2)])
    list(generation)
    assert on.engine.samples.corpus is None
    assert not {ADD, LIST, REMOVE} & set(on.server.heard)


@dataclass
class Kept:
    """Stands for a KeptServer, and its client, that can be replaced, refuse and go away."""

    num_replaced: int = 0
    errors: list[Exception] = field(default_factory=list)
    added: list[list[str]] = field(default_factory=list)

    @property
    def client(self) -> Kept:
        return self

    async def get(self, path: str) -> Any:
        return {}

    async def post(self, path: str, body: Mapping[str, Any]) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.added.append(body["documents"])


async def fed_by(corpus: ReplyCorpus, reply: tuple[int, ...]) -> None:
    """A new group, of which the corpus hears, and all that it does then."""
    await corpus.begin(object(), asked(EarlierReply(reply, 1)))
    if corpus._feeding is not None:
        await corpus._feeding


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.sglang_engine.reply_corpus.GATHER_S", 0.0)


def corpus_of(server: Kept) -> ReplyCorpus:
    return ReplyCorpus(server, ReplyTexts(), lambda ids: " ".join(map(str, ids[len(PROMPT) :])))  # type: ignore[arg-type]


@pytest.mark.usefixtures("quick")
def test_a_corpus_is_made_anew_when_it_lacks_a_fourth_and_for_a_server_that_was_replaced() -> None:
    server = Kept()

    async def run() -> None:
        corpus = corpus_of(server)
        await fed_by(corpus, (1, 2, 3, 4, 5))
        await fed_by(corpus, (6, 7))  # two of eight
        assert server.added == [["1 2 3 4 5"]]
        await fed_by(corpus, (8,))
        assert server.added[1:] == [["1 2 3 4 5", "6 7", "8"]]
        server.num_replaced += 1
        await corpus.learn("nobody", [])
        assert corpus._feeding is not None
        await corpus._feeding
        assert server.added[2:] == server.added[1:2]

    asyncio.run(run())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("error", "num_tries"), [(ServerGone("away"), 6), (ServerRefused(ADD, 400, "busy"), MAX_REFUSALS)]
)
def test_what_a_server_did_not_take_is_sent_again_but_not_to_one_that_refuses(error: Exception, num_tries: int) -> None:
    server = Kept(errors=[error] * 5)

    async def run() -> None:
        corpus = corpus_of(server)
        for reply in range(6):
            await fed_by(corpus, (reply,))

    asyncio.run(run())
    assert 5 - len(server.errors) + len(server.added) == num_tries
    assert server.added == ([["0", "1", "2", "3", "4", "5"]] if num_tries == 6 else [])
