"""The canary generates a few fixed prompts greedily after each push: are drafts still accepted as before?

A draft that was overwritten, lost or left behind causes no error: its drafts are refused, the output stays right, and
the run is slower than without speculation. Accepted drafts per round (accept length less the token that every round
brings) are compared with their own running mean.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from rollout.sglang_engine.client import SglangClient
from slime_spec.sglang.metadata import spec_counters
from slime_spec.speculation.counters import pooled
from slime_spec.types import SpecCounters

logger = logging.getLogger(__name__)

MEMORY = 0.7  # weight of the past in the running mean


@dataclass
class Canary:
    """Generates and judges the canary's prompts: the first that came, of ``longest`` tokens at most.

    ``drop`` is the share of the mean below which the draft is taken for lost.
    """

    num_prompts: int
    num_tokens: int
    drop: float
    longest: int
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    mean: float | None = None

    def see(self, prompt: Sequence[int]) -> None:
        """Keep a prompt for the canary until there are ``num_prompts``."""
        ids = tuple(prompt)
        if len(self.prompts) < self.num_prompts and len(ids) <= self.longest and ids not in self.prompts:
            self.prompts.append(ids)

    async def run(self, client: SglangClient) -> SpecCounters:
        """Generate all prompts and return what was drafted and accepted."""
        answers = await asyncio.gather(*(self._generate(client, prompt) for prompt in self.prompts))
        return pooled(spec_counters(answer["meta_info"]) for answer in answers)

    def judge(self, counted: SpecCounters) -> bool:
        """Return whether as many drafts per round are accepted as before; a good number goes into the mean.

        It is True where no round was verified.
        """
        if not counted.num_rounds:
            return True
        accepted = counted.num_correct / counted.num_rounds
        if self.mean is not None and accepted < self.drop * self.mean:
            logger.error("ALARM drafts are refused accepted_per_round=%.3f mean=%.3f", accepted, self.mean)
            return False
        self.mean = accepted if self.mean is None else MEMORY * self.mean + (1 - MEMORY) * accepted
        logger.info("canary accepted_per_round=%.3f mean=%.3f", accepted, self.mean)
        return True

    async def _generate(self, client: SglangClient, prompt: tuple[int, ...]) -> dict[str, Any]:
        sampling = {"temperature": 0.0, "max_new_tokens": self.num_tokens, "ignore_eos": True}
        rid = f"canary-{uuid4().hex}"
        # Each request has its own cache key: cached prefixes of older weights would hide what the new weights do.
        body = {"rid": rid, "input_ids": list(prompt), "sampling_params": sampling, "extra_key": rid}
        answer: dict[str, Any] = await client.post("/generate", body)
        return answer
