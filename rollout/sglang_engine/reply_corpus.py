"""ReplyCorpus feeds one n-gram server with the replies to the prompts that it generates for, as an external corpus.

    begin(request.earlier) ─┐
    learn(siblings) ────────┴─► ReplyTexts ─► /add_external_corpus (a new one) ─► /remove_external_corpus (the last one)

SGLang divides a round's nodes for corpora evenly among them, and searches all of them for every request: a corpus for
each prompt would leave none a node. So there is one corpus, made anew when it lacks a fourth of what it would have:
over a run that costs a few times its texts. It takes text and tokenises it; a reply that comes out as other tokens is
drafted for badly, and no sample depends on it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable, Sequence
from http import HTTPStatus
from itertools import count
from typing import Any, Protocol
from uuid import uuid4

from rollout.sglang_engine.client import ServerGone, ServerRefused, SglangClient
from rollout.sglang_engine.reply_texts import ReplyTexts
from slime_spec.types import EarlierReply, GroupRequest

logger = logging.getLogger(__name__)

ADD, REMOVE, LIST = "/add_external_corpus", "/remove_external_corpus", "/list_external_corpora"
PREFIX = "slime-spec-replies-"  # of every corpus of a run's, so that a server that outlives a run is rid of them
GATHER_S = 0.2  # what comes together goes into one corpus
LEAST_FRESH = 0.25  # of the tokens of the corpus
MAX_REFUSALS = 3  # in a row, then the server is fed no more


class FedServer(Protocol):
    """Is a server with a client in the loop of its corpus; ``num_replaced`` counts the servers that it has replaced."""

    @property
    def client(self) -> SglangClient: ...

    @property
    def num_replaced(self) -> int: ...


class ReplyCorpus:
    """Keeps the corpus of one engine's server. Its methods run in the engine's asyncio loop, and none is waited for.

    A server that was replaced is fed anew. One that lacks the calls, or refuses corpora, is fed no more: a warning says
    so, and it goes on drafting from what its own requests say. ``decode`` turns token ids into text, special tokens
    included.
    """

    def __init__(self, server: FedServer, texts: ReplyTexts, decode: Callable[[Sequence[int]], str]) -> None:
        self._server, self._texts, self._decode = server, texts, decode
        self._run, self._numbers = uuid4().hex[:8], count()
        self._feeding: asyncio.Task[None] | None = None
        self._num_replaced = 0  # servers, when the last corpus was made
        self._num_refused = 0
        self.num_fed = 0

    async def begin(self, group: Hashable, request: GroupRequest) -> None:
        """Note a group that the server is about to generate, with the replies that came with it."""
        self._texts.begin(group, request)
        self._feed_if_due()

    async def learn(self, group: Hashable, replies: Sequence[EarlierReply]) -> None:
        """Note replies of the group's samples that finished elsewhere."""
        self._texts.learn(group, replies)
        self._feed_if_due()

    def ended(self, group: Hashable) -> None:
        """Note that one sample of a group has ended; the group's texts leave with the next corpus after its last."""
        self._texts.sample_ended(group)

    @property
    def _is_due(self) -> bool:
        return self._num_refused < MAX_REFUSALS and self._texts.num_fresh > LEAST_FRESH * self._texts.num_taken

    def _feed_if_due(self) -> None:
        if self._server.num_replaced != self._num_replaced:
            self._num_replaced = self._server.num_replaced
            self._texts.lose()
        if self._feeding is None and self._is_due:
            self._feeding = asyncio.create_task(self._feed())

    async def _feed(self) -> None:
        try:
            while self._is_due:
                await asyncio.sleep(GATHER_S)
                await self._make_anew()
                self._num_refused = 0
        except ServerRefused as error:
            lacks = error.status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED)
            self._num_refused = MAX_REFUSALS if lacks else self._num_refused + 1
            self._texts.lose()
            logger.warning("the server took no corpus of replies refusals=%d reason=%s", self._num_refused, error)
        except ServerGone as error:
            self._texts.lose()
            logger.info("the server went away under a corpus of replies reason=%s", error)
        finally:
            self._feeding = None

    async def _make_anew(self) -> None:
        """Give the server a corpus of all texts, then take away those that it had of this run or an earlier one."""
        documents = self._texts.take()
        if not documents:
            return
        texts = await asyncio.to_thread(lambda: [self._decode(each) for each in documents])
        client = self._server.client
        known = _own(await client.get(LIST))
        name = f"{PREFIX}{self._run}-{next(self._numbers)}"
        await client.post(ADD, {"corpus_id": name, "documents": texts})
        for old in known:
            await client.post(REMOVE, {"corpus_id": old})
        self.num_fed += 1
        logger.debug("corpus of replies made texts=%d tokens=%d", len(texts), self._texts.num_taken)


def _own(answer: Any) -> list[str]:
    """Return the names of this project's corpora in a server's list."""
    counts = answer.get("corpus_token_counts") if isinstance(answer, dict) else None
    return [name for name in counts if name.startswith(PREFIX)] if isinstance(counts, dict) else []
