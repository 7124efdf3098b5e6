"""The canary of a server: one fixed prompt, generated greedily with drafts, and judged by the target alone.

The target reads prompt and response at once, as a prompt, which no draft takes part in, and gives its best token at
each place: speculation is exact where those are the response's. Two kernels may rank nearly equal tokens differently,
so what counts is the regret, how much better the target's best token is than the response's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from uuid import uuid4

from rollout.sglang_engine.plugin.sessions import Messages, sglang_messages
from slime_spec.sglang.metadata import UnknownMetadataError, spec_counters
from slime_spec.speculation.accepted_mean import AcceptedMean
from slime_spec.types import SpecCounters

NUM_TOKENS = 32
NUM_PROMPT = 16
# In bfloat16 a logit of 32 is known to a quarter.
TOLERANCE = 0.25
DROP = 0.5
MAX_MEANS = 100


class NoCanary(ValueError):
    """A canary that was asked for cannot be run, or its answers cannot be compared."""


@dataclass(frozen=True)
class Asked:
    """What a request may say of the canary."""

    input_ids: Sequence[int]
    max_new_tokens: int
    tolerance: float

    @property
    def key(self) -> tuple[tuple[int, ...], int]:
        """What another canary must have asked for its accepted drafts to compare: by prompt they differ much."""
        return tuple(self.input_ids), self.max_new_tokens

    @classmethod
    def read(cls, body: dict[str, Any], vocab_size: int) -> Asked:
        """Raises NoCanary for what cannot be meant."""
        fixed = [token % vocab_size for token in range(1, NUM_PROMPT + 1)]
        given = {"input_ids": fixed, "max_new_tokens": NUM_TOKENS, "tolerance": TOLERANCE, **body}
        if unknown := sorted(given.keys() - {"input_ids", "max_new_tokens", "tolerance"}):
            raise NoCanary(f"unknown: {', '.join(unknown)}; known are input_ids, max_new_tokens, tolerance")
        ids, num_tokens, tolerance = given["input_ids"], given["max_new_tokens"], given["tolerance"]
        if not isinstance(ids, list) or not ids or not all(type(id) is int and 0 <= id < vocab_size for id in ids):
            raise NoCanary(f"input_ids must be token ids from 0 to {vocab_size - 1}")
        if type(num_tokens) is not int or num_tokens < 2:
            raise NoCanary("max_new_tokens must be at least 2: the prefill brings the first token, without a draft")
        if type(tolerance) not in (int, float) or not tolerance >= 0:
            raise NoCanary("tolerance must be a number of nats from 0 up")
        return cls(ids, num_tokens, float(tolerance))


class Means:
    """The means of accepted drafts, one for each prompt and length; what was asked longest ago is forgotten."""

    def __init__(self, max_means: int = MAX_MEANS) -> None:
        self._max_means = max_means
        self._means: dict[object, AcceptedMean] = {}

    def of(self, asked: Asked) -> AcceptedMean:
        known = self._means.pop(asked.key) if asked.key in self._means else AcceptedMean(DROP)
        self._means[asked.key] = known
        if len(self._means) > self._max_means:
            del self._means[next(iter(self._means))]
        return known


MEANS = Means()


@dataclass(frozen=True)
class Judged:
    """How the response compares: in tokens, in nats, and in accepted drafts with earlier ones of the same prompt."""

    is_greedy: bool
    is_accepted_as_before: bool
    num_tokens: int
    num_differing: int
    largest_regret: float
    largest_logprob_difference: float
    num_rounds: int
    num_proposed: int
    num_correct: int
    accepted_per_round: float
    mean_accepted_per_round: float | None
    weight_version: str | None

    def shown(self) -> dict[str, Any]:
        return asdict(self)


async def run(manager: Any, asked: Asked, means: Means = MEANS, messages: Messages = sglang_messages) -> Judged:
    """Generates and judges; raises NoCanary where the server is paused or aborts a part of it."""
    if manager.is_pause:
        raise NoCanary("generation is paused, and the canary would wait: ask once it continues")
    request = messages().GenerateReqInput
    sampling = {"temperature": 0.0, "max_new_tokens": asked.max_new_tokens, "ignore_eos": True}
    drafted = await _ask(manager, request, asked.input_ids, sampling_params=sampling)
    response = drafted["output_ids"]
    read = await _ask(
        manager,
        request,
        [*asked.input_ids, *response],
        sampling_params={**sampling, "max_new_tokens": 1},
        logprob_start_len=len(asked.input_ids) - 1,
        top_logprobs_num=1,
    )
    return judged(drafted, read, asked.tolerance, means.of(asked))


def judged(drafted: dict[str, Any], read: dict[str, Any], tolerance: float, mean: AcceptedMean) -> Judged:
    """Compares a response with the target's reading of it; raises NoCanary for answers that are not whole."""
    response, meta, target = drafted["output_ids"], drafted["meta_info"], read["meta_info"]
    try:
        counted = spec_counters(meta)
        own = [row[0] for row in target["input_token_logprobs"][-len(response) :]]
        best = [row[0] for row in target["input_top_logprobs"][-len(response) :]]  # (logprob, token, text) each
        drawn = [row[0] for row in meta["output_token_logprobs"]]
        regrets = [top[0] - logprob for top, logprob in zip(best, own, strict=True)]
        moved = [abs(one - other) for one, other in zip(drawn, own, strict=True)]
        num_broken = sum(not math.isfinite(each) for each in (*regrets, *moved))
    except (KeyError, TypeError, IndexError, ValueError, UnknownMetadataError) as error:
        raise NoCanary(f"the server's answers lack what is compared: {type(error).__name__} {error}") from error
    if num_broken or not response:
        raise NoCanary(f"tokens={len(response)}, and of their logprobs {num_broken} are no finite numbers")
    return Judged(
        is_greedy=all(regret <= tolerance for regret in regrets),
        is_accepted_as_before=mean.judge(counted),
        num_tokens=len(response),
        num_differing=sum(top[1] != token for top, token in zip(best, response, strict=True)),
        largest_regret=max(regrets),
        largest_logprob_difference=max(moved),
        num_rounds=counted.num_rounds,
        num_proposed=counted.num_proposed,
        num_correct=counted.num_correct,
        accepted_per_round=per_round(counted),
        mean_accepted_per_round=mean.mean,
        weight_version=meta.get("weight_version"),
    )


def per_round(counted: SpecCounters) -> float:
    return counted.num_correct / counted.num_rounds if counted.num_rounds else 0.0


async def _ask(manager: Any, request: Any, input_ids: Sequence[int], **fields: Any) -> dict[str, Any]:
    rid = f"slime_spec-canary-{uuid4().hex}"
    # A key of its own: cached prefixes of older weights would hide what the new ones do.
    asked = request(rid=rid, input_ids=list(input_ids), return_logprob=True, extra_key=rid, **fields)
    async for answer in manager.generate_request(asked, None):
        if answer["meta_info"]["finish_reason"]["type"] == "abort":
            raise NoCanary(f"the server aborted it: {answer['meta_info']['finish_reason'].get('message')}")
        return dict(answer)
    raise NoCanary("the server did not answer")
