"""These functions try out on a server whether requests can opt out of speculation, and what drafting brings at a batch.

Nothing is assumed of a release: a switch is one whose request comes back without a verify round, and a batch is run in
turns (with drafts, without, without, with), so that what else the machine does falls on both sides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from rollout.sglang_engine.canary import LONGEST_S, NoAnswer, counters_of
from rollout.sglang_engine.client import ServerRefused, SglangClient
from rollout.sglang_engine.round_meter import RoundMeter
from slime_spec.sglang.speculation_control import RequestSwitch, switches_to_try
from slime_spec.speculation.rollout_switch import BatchUse

TRIAL_TOKENS = 8
SIDES = (True, False, False, True)  # of a measurement: with drafts or without


@dataclass(frozen=True)
class Side:
    """Holds one side of a measurement at a full batch: seconds, tokens, and what its requests' counters say.

    ``num_counted`` are the tokens that ``num_rounds`` brought, at whatever batch.
    """

    use: BatchUse
    num_counted: int = 0
    num_rounds: int = 0

    @property
    def token_s(self) -> float:
        return self.use.seconds / self.use.num_tokens


@dataclass(frozen=True)
class Measurement:
    """Holds the sides of a measurement in pairs of one with drafts and one without."""

    pairs: tuple[tuple[Side, Side], ...]

    @property
    def num_counted(self) -> int:
        return sum(drafted.num_counted for drafted, _ in self.pairs)

    @property
    def num_rounds(self) -> int:
        return sum(drafted.num_rounds for drafted, _ in self.pairs)

    @property
    def break_even(self) -> list[float]:
        """Return, of each pair, how many plain steps a round with drafts took."""
        length = self.num_counted / self.num_rounds
        return [length * drafted.token_s / plain.token_s for drafted, plain in self.pairs]


async def find_switch(client: SglangClient, prompt: Sequence[int], version: str) -> RequestSwitch | None:
    """Return the field by which a request opts out; None where the server, of this version, has none.

    Raises NoAnswer where the server does not speculate at all, or answers otherwise than it should; ServerGone.
    """
    if not await _num_rounds(client, _request(prompt, {"temperature": 0.0}, TRIAL_TOKENS)):
        raise NoAnswer("a request without any switch came back without a verify round")
    for switch in switches_to_try(version):
        async with client.apart() as trial:
            try:
                if not await _num_rounds(trial, switch.put(_request(prompt, {"temperature": 0.0}, TRIAL_TOKENS))):
                    return switch
            except ServerRefused:  # it does not know the field
                continue
    return None


async def measure(
    client: SglangClient,
    prompts: Sequence[Sequence[int]],
    sampling: Mapping[str, Any],
    num_tokens: int,
    num_running: int,
    switch: RequestSwitch,
) -> Measurement:
    """Generate ``num_tokens`` for each of ``num_running`` requests with drafts and without, in turns.

    ``sampling`` are SGLang's sampling_params of the run. Raises NoAnswer where no moment had all requests running.
    """
    key = f"turns-{uuid4().hex}"  # the sides share their prompts' prefixes with each other, and with nobody else
    sides = []
    for drafts in SIDES:
        bodies = [_request(prompts[each % len(prompts)], sampling, num_tokens, key) for each in range(num_running)]
        bodies = bodies if drafts else [switch.put(body) for body in bodies]
        sides.append(await asyncio.wait_for(_side(client, bodies), LONGEST_S))
    first, second, third, fourth = sides
    return Measurement(((first, second), (fourth, third)))


async def _side(client: SglangClient, bodies: Sequence[Mapping[str, Any]]) -> Side:
    meter = RoundMeter()
    counted = await asyncio.gather(*(_streamed(client, body, meter) for body in bodies))
    full = next((use for use in meter.take() if use.num_running == len(bodies)), None)
    if full is None:
        raise NoAnswer(f"{len(bodies)} requests never ran at once")
    return Side(full, sum(tokens for tokens, _ in counted), sum(rounds for _, rounds in counted))


async def _streamed(client: SglangClient, body: Mapping[str, Any], meter: RoundMeter) -> tuple[int, int]:
    """Return the tokens that came out of rounds, and how many rounds there were."""
    had, chunk = 0, None
    try:
        async with aclosing(client.stream(body)) as chunks:
            async for chunk in chunks:
                total = chunk.get("meta_info", {}).get("completion_tokens")
                if type(total) is not int:
                    raise NoAnswer(f"a chunk without completion_tokens: {str(chunk)[:200]}")
                meter.brought(body["rid"], total - had)
                had = total
    finally:
        meter.closed(body["rid"])
    return max(0, had - 1), counters_of(chunk).num_rounds


def _request(prompt: Sequence[int], sampling: Mapping[str, Any], num_tokens: int, key: str = "") -> dict[str, Any]:
    rid = f"turns-{uuid4().hex}"
    params = {**sampling, "max_new_tokens": num_tokens, "ignore_eos": True}
    return {"rid": rid, "input_ids": list(prompt), "sampling_params": params, "extra_key": key or rid}


async def _num_rounds(client: SglangClient, body: Mapping[str, Any]) -> int:
    return counters_of(await client.post("/generate", body, LONGEST_S)).num_rounds
