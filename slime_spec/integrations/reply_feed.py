"""ReplyFeed gives n-gram servers the replies of a framework's samples: earlier ones to a prompt, and its siblings'.

    began(key)               the prompt's earlier replies ─► ReplyCorpus of every server
    ended(key, replies)      its replies ─► the history; ─► the corpora, where siblings are still generated

A router sends a prompt's samples anywhere: every server is fed with all of them. Its methods run in one asyncio loop,
while a framework goes on changing its samples: ``key_of`` and ``reply_of`` take what they need of one before.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import xxhash

from rollout.sglang_engine.reply_corpus import FedServer, ReplyCorpus
from rollout.sglang_engine.reply_texts import MAX_CORPUS_TOKENS, ReplyTexts
from slime_spec.integrations.answers import ABORTED, prompt_and_reply
from slime_spec.rl.reply_history import ReplyHistory
from slime_spec.sglang.labels import version_number
from slime_spec.types import EarlierReply, GeneratedSample, GroupRequest, SamplingParams

MAX_PROMPTS = 65_536  # whose token ids are kept

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Finished:
    """Holds a finished reply; ``version`` is the oldest of the weights that generated it."""

    prompt: tuple[int, ...]
    reply: tuple[int, ...]
    version: int


class ReplyFeed:
    """Feeds the servers that ``serve`` names; ``decode`` turns token ids into text, special tokens included."""

    def __init__(self, decode: Decode, max_tokens: int = MAX_CORPUS_TOKENS) -> None:
        self._decode, self._max_tokens = decode, max_tokens
        self._corpora: dict[int, ReplyCorpus] = {}  # by the server's identity
        self._history = ReplyHistory()
        self._prompts: OrderedDict[bytes, array[int]] = OrderedDict()  # token ids of a prompt that was generated for
        self._num_running: Counter[bytes] = Counter()
        self._fed: dict[bytes, list[ReplyCorpus]] = {}  # by prompt, the corpora that know of it

    @classmethod
    def of(cls, args: Any) -> ReplyFeed:
        """Make the feed of a framework's ``args``, whose tokenizer is read when the first reply is fed."""
        folder = args.hf_checkpoint

        @cache
        def tokenizer() -> Any:
            from slime_spec.checkpoints.tokenizer import Tokenizer

            return Tokenizer.load(folder)

        bound = getattr(args, "sglang_speculative_ngram_external_corpus_max_tokens", None)
        # A server counts the corpus that it is given beside the one that is taken away next.
        max_tokens = min(MAX_CORPUS_TOKENS, bound // 2) if type(bound) is int else MAX_CORPUS_TOKENS
        return cls(lambda ids: tokenizer().decode(ids, skip_special=False), max_tokens)

    def serve(self, servers: Iterable[FedServer]) -> None:
        """Feed these servers from now on; what is generated already is not told to a server that is new."""
        for server in servers:
            if id(server) not in self._corpora:
                self._corpora[id(server)] = ReplyCorpus(server, ReplyTexts(self._max_tokens), self._decode)

    async def began(self, key: bytes) -> None:
        """Note that a sample of the prompt ``key`` is about to be generated."""
        self._num_running[key] += 1
        if key not in self._fed:
            await self._tell(key)

    async def ended(self, key: bytes, replies: Sequence[Finished]) -> None:
        """Note the replies of one that ``began``, none where it failed or goes on later."""
        self._num_running[key] -= 1
        for each in replies:
            await self._note(key, each)
        if not self._num_running[key]:
            del self._num_running[key]
            for corpus in self._fed.pop(key, ()):
                corpus.ended(key)

    async def _note(self, key: bytes, finished: Finished) -> None:
        """Keep a finished reply, and tell of it where siblings still run."""
        self._prompts[key] = array("i", finished.prompt)
        self._prompts.move_to_end(key)
        while len(self._prompts) > MAX_PROMPTS:
            self._prompts.popitem(last=False)
        sample = GeneratedSample("", 0, finished.reply, (), "stop", finished.version, len(finished.prompt))
        self._history.note(self._prompts[key], [sample])
        if not self._num_running[key]:
            return
        if key not in self._fed:
            await self._tell(key)
        elif len(self._corpora) > 1:  # a server alone has drafted from it already
            for corpus in self._fed[key]:
                await corpus.learn(key, [EarlierReply(finished.reply, finished.version, sample_index=0)])

    async def _tell(self, key: bytes) -> None:
        """Begin a prompt at every server with the replies that are known; nothing is fed for a prompt without any."""
        if key not in self._prompts or not self._corpora:
            return
        prompt = tuple(self._prompts[key])
        if earlier := self._history.of(prompt):
            request = GroupRequest(key.hex(), prompt, (0,), SamplingParams(), earlier=earlier)
            self._fed[key] = list(self._corpora.values())
            for corpus in self._fed[key]:
                await corpus.begin(key, request)


def key_of(sample: Any) -> bytes:
    """Return a digest of a sample's prompt, a text or a chat; two that shared one would only be drafted for badly."""
    return xxhash.xxh3_128_digest(str(sample.prompt).encode("utf-8", "surrogatepass"))


def reply_of(sample: Any) -> Finished | None:
    """Return a sample's reply; None where it has none, or goes on later."""
    prompt, reply = prompt_and_reply(sample)
    if not reply or sample.status.value == ABORTED:
        return None
    return Finished(prompt, reply, _oldest(sample.weight_versions))


def _oldest(labels: Sequence[Any]) -> int:
    try:
        return min((version_number(str(label)) for label in labels), default=0)
    except ValueError:
        return 0
