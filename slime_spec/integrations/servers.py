"""Servers asks the servers behind a framework's router what nothing in a sample says, beside the framework's own calls.

    began(sample) ──► once a rollout: who the servers are, the canary
    ended(sample) ──► prompts for the canary; replies for n-gram servers (ReplyFeed)
    measured()    ──► metrics of the rollout

It has a thread and a loop of its own: no hook waits for a server, but ``measured``, when the rollout is over.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from rollout.sglang_engine.canary import Canary
from rollout.sglang_engine.client import ServerGone, ServerRefused, SglangClient
from rollout.sglang_engine.loop_thread import AsyncLoop
from slime_spec.errors import raised
from slime_spec.integrations.answers import algorithm_of, prompt_and_reply
from slime_spec.integrations.reply_feed import ReplyFeed, key_of, reply_of
from slime_spec.integrations.settings import PluginSettings
from slime_spec.metrics.engines import counted_canaries, net_metrics
from slime_spec.sglang.server_info import PATHS
from slime_spec.speculation.net_benefit import NetBenefit
from slime_spec.types import SpecCounters

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 10.0
LONGEST_PROMPT = 1 << 20  # of a canary: what was generated for once can be again


@dataclass
class Worker:
    """Holds what is known of one server; ``before`` are the sums of its rounds as the last rollout was over."""

    client: SglangClient
    canary: Canary
    before: NetBenefit | None = None
    counted: SpecCounters = field(default_factory=SpecCounters)
    num_replaced: int = 0  # nobody tells of a server that came back at the same address


class Servers:
    """Keeps the servers of one process of a framework; ``router`` is its router's URL, None where it has none."""

    def __init__(self, router: str | None, settings: PluginSettings, feed: ReplyFeed | None = None) -> None:
        self._router, self._settings, self._feed = router, settings, feed
        self._loop: AsyncLoop | None = None
        self._workers: dict[str, Worker] = {}
        self._prompts: list[tuple[int, ...]] = []
        self._beginning: Future[None] | None = None
        self._keys: dict[int, bytes] = {}  # by a sample's identity, while it is generated

    @classmethod
    def of(cls, args: Any, settings: PluginSettings) -> Servers:
        """Make the servers of a framework's ``args``."""
        host, port = getattr(args, "sglang_router_ip", None), getattr(args, "sglang_router_port", None)
        router = f"http://{host}:{port}" if host and port else None
        algorithm = algorithm_of(args)
        feeds = settings.feed_replies and algorithm is not None and algorithm.takes_corpus
        return cls(router, settings, ReplyFeed.of(args) if feeds else None)

    def began(self, sample: Any) -> None:
        """Note a sample that is about to be generated; the first of a rollout begins the rollout here, too."""
        if self._router is None and not self._settings.servers:
            return
        loop = self._running()
        if self._beginning is None:
            self._beginning = loop.submit(self._begin(list(self._prompts)))
        if (feed := self._feed) is not None:
            key = self._keys[id(sample)] = key_of(sample)
            self._tell(feed.began(key))

    def ended(self, sample: Any, made: Sequence[Any]) -> None:
        """Note what became of a sample that ``began``: the samples that were made of it, none where that failed."""
        if self._loop is None:
            return
        for each in made:
            prompt, _ = prompt_and_reply(each)
            if len(self._prompts) < self._settings.canary_prompts and prompt and prompt not in self._prompts:
                self._prompts.append(prompt)
        key = self._keys.pop(id(sample), None)
        if (feed := self._feed) is not None and key is not None:
            self._tell(feed.ended(key, [reply for each in made if (reply := reply_of(each)) is not None]))

    def measured(self) -> dict[str, float]:
        """Return what servers say of the rollout that is over; the next sample begins another."""
        if self._loop is None or self._beginning is None:
            return {}
        beginning, self._beginning = self._beginning, None
        return self._loop.call(self._measured(beginning))

    def leave_out(self) -> None:
        """Count the rounds until now, an evaluation's, in no rollout."""
        if self._loop is not None:
            self._loop.call(self._since_last())

    def close(self) -> None:
        if self._loop is not None:
            self._loop.call(self._close_clients())
            self._loop.close()
            self._loop = None

    def _running(self) -> AsyncLoop:
        if self._loop is None:
            self._loop = AsyncLoop("slime-spec-servers")
        return self._loop

    def _tell(self, telling: Coroutine[Any, Any, None]) -> None:
        """Have the feed hear of a sample; nobody waits for it."""
        self._running().submit(telling).add_done_callback(self._told)

    def _told(self, done: Future[None]) -> None:
        """End the feed at its first error: what it knows of prompts in progress may be wrong from then on."""
        if done.cancelled() or (error := done.exception()) is None or self._feed is None:
            return
        self._feed = None
        logger.error("servers are given no replies from now on reason=%s", raised(error), exc_info=error)

    async def _begin(self, prompts: list[tuple[int, ...]]) -> None:
        """Find the servers, and have each generate these prompts for its canary."""
        for url in await self._urls():
            if url not in self._workers:
                self._workers[url] = await self._open(url)
        workers = list(self._workers.values())
        if (feed := self._feed) is not None:
            feed.serve(workers)
        if prompts:
            for worker in workers:
                worker.canary.prompts = prompts
            await asyncio.gather(*map(_run_canary, workers))

    async def _measured(self, beginning: Future[None]) -> dict[str, float]:
        await asyncio.wrap_future(beginning)
        total, workers = await self._since_last(), self._workers.values()
        counted = [worker.counted for worker in workers]
        for worker in workers:
            worker.counted = SpecCounters()
        return net_metrics(total) | counted_canaries(counted)

    async def _since_last(self) -> NetBenefit:
        """Return what all servers' rounds took and gained since the last call, since their starts at the first."""
        total = NetBenefit()
        for worker in self._workers.values():
            before, now = worker.before, await _sums(worker.client)
            worker.before = now
            if now is not None:
                total = total.plus(now if before is None else now.since(before))
        return total

    async def _urls(self) -> list[str]:
        """Return the servers' URLs: those of the settings, or the router's, which may be a server itself."""
        if self._settings.servers:
            return [f"http://{address}" for address in self._settings.servers]
        assert self._router is not None, "a rollout began"
        client = SglangClient(self._router)
        await client.open()
        try:
            answer = await client.get("/workers", ASK_TIMEOUT_S)
        except ServerRefused:
            return [self._router]
        except ServerGone as error:
            logger.warning("the router did not list its servers: no canary, no net speed-up reason=%s", error)
            return []
        finally:
            await client.close()
        return list(_listed(answer)) or [self._router]

    async def _open(self, url: str) -> Worker:
        client, settings = SglangClient(url), self._settings
        await client.open()
        canary = Canary(settings.canary_prompts, settings.canary_tokens, settings.canary_drop, LONGEST_PROMPT)
        return Worker(client, canary)

    async def _close_clients(self) -> None:
        for worker in self._workers.values():
            await worker.client.close()


def _listed(answer: object) -> Iterable[str]:
    """Yield the URLs of a router's list of workers."""
    workers = answer.get("workers") if isinstance(answer, Mapping) else None
    for worker in workers if isinstance(workers, list) else []:
        if isinstance(worker, Mapping) and isinstance(worker.get("url"), str):
            yield worker["url"]


async def _sums(client: SglangClient) -> NetBenefit | None:
    """Return what a server's rounds took, and would have taken without drafts; most servers measure neither."""
    for path in PATHS:
        try:
            return _sums_of(await client.get(path, ASK_TIMEOUT_S))
        except ServerRefused:
            continue
        except ServerGone as error:
            logger.warning("a server did not say what its rounds took url=%s reason=%s", client.url, error)
            return None
    return None


def _sums_of(answer: Any) -> NetBenefit | None:
    try:
        sums = answer["internal_states"][0]["net_benefit"]
        return NetBenefit(**{name: float(sums[name]) for name in NetBenefit._fields})
    except (KeyError, IndexError, TypeError, ValueError):
        return None


async def _run_canary(worker: Worker) -> None:
    """Generate the canary's prompts on a server, and judge what is accepted: the canary logs an alarm."""
    client = worker.client
    try:
        counted = await worker.canary.run(client, lambda: client.answers(ASK_TIMEOUT_S))
    except ServerGone as error:
        logger.warning("a server went away under its canary url=%s reason=%s", client.url, error)
        return
    if counted is not None:
        worker.counted = counted
        worker.canary.judge(counted)
