"""The canary generates a few fixed prompts greedily after each push: are drafts still accepted as before?

A draft that was overwritten, lost or left behind causes no error: its drafts are refused, the output stays right, and
the run is slower than without speculation. Accepted drafts per round (accept length less the token that every round
brings) are compared with their own running mean.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from rollout.sglang_engine.client import ServerGone, ServerRefused, SglangClient
from slime_spec.sglang.metadata import spec_counters
from slime_spec.speculation.accepted_mean import AcceptedMean
from slime_spec.speculation.counters import pooled
from slime_spec.types import SpecCounters

logger = logging.getLogger(__name__)

LONGEST_S = 120.0  # of one attempt: a server that takes longer for a few tokens hangs
ANSWER_SHOWN = 200  # characters of an odd answer


class NoAnswer(RuntimeError):
    """The server answered the canary with something that is no response."""


@dataclass
class Canary:
    """Generates and judges the canary's prompts: the first that came, of ``longest`` tokens at most.

    ``drop`` is the share of the mean below which the draft is taken for lost. A canary that is not answered is tried
    again after each of ``waits_s``.
    """

    num_prompts: int
    num_tokens: int
    drop: float
    longest: int
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    waits_s: tuple[float, ...] = (1.0, 5.0)

    def __post_init__(self) -> None:
        self._accepted = AcceptedMean(self.drop)

    def see(self, prompt: Sequence[int]) -> None:
        """Keep a prompt for the canary until there are ``num_prompts``."""
        ids = tuple(prompt)
        if len(self.prompts) < self.num_prompts and len(ids) <= self.longest and ids not in self.prompts:
            self.prompts.append(ids)

    async def run(self, client: SglangClient, lives: Callable[[], Awaitable[bool]]) -> SpecCounters | None:
        """Generate all prompts and return what was drafted and accepted; None where a living server answers none.

        A server that is busy (429, an abort) or garbled says nothing of the weights: no push ends for that. Raises
        ServerGone where the server is gone or hangs; ``lives`` asks it.
        """
        for wait_s in (*self.waits_s, None):
            try:
                return pooled(await asyncio.gather(*(self._generate(client, prompt) for prompt in self.prompts)))
            except (ServerGone, ServerRefused, NoAnswer) as error:
                if isinstance(error, ServerGone) and not await lives():
                    raise
                logger.warning("the canary was not answered again_in_s=%s reason=%s", wait_s, error)
                if wait_s is not None:
                    await asyncio.sleep(wait_s)
        return None

    @property
    def mean(self) -> float | None:
        """Return the mean of accepted drafts per round; None before the first count."""
        return self._accepted.mean

    def judge(self, counted: SpecCounters) -> bool:
        """Return whether as many drafts per round are accepted as before."""
        return self._accepted.judge(counted)

    async def _generate(self, client: SglangClient, prompt: tuple[int, ...]) -> SpecCounters:
        sampling = {"temperature": 0.0, "max_new_tokens": self.num_tokens, "ignore_eos": True}
        rid = f"canary-{uuid4().hex}"
        # Each request has its own cache key: cached prefixes of older weights would hide what the new weights do.
        body = {"rid": rid, "input_ids": list(prompt), "sampling_params": sampling, "extra_key": rid}
        return counters_of(await client.post("/generate", body, LONGEST_S))


def counters_of(answer: Any) -> SpecCounters:
    """Return the counters of a whole response; raises NoAnswer for anything else."""
    try:
        meta = answer["meta_info"]
        is_whole = meta["finish_reason"]["type"] != "abort"
        counters = spec_counters(meta)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise NoAnswer(f"{type(error).__name__} {error} in {str(answer)[:ANSWER_SHOWN]}") from error
    if not is_whole or counters.num_rounds < 0 or not 0 <= counters.num_correct <= counters.num_proposed:
        raise NoAnswer(str(answer)[:ANSWER_SHOWN])
    return counters
