"""The state of what is being generated: a group that shares one prompt, and each of its sequences."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from rollout.embedded.stop import Ending
from slime_spec.types import GeneratedSample, GroupRequest, SpecCounters

OnSample = Callable[[GeneratedSample], None]


@dataclass(eq=False)
class Group:
    """One request on its way through the engine; ``waiting`` holds the sample indices that have no row yet."""

    request: GroupRequest
    arrival_s: float
    on_sample: OnSample
    waiting: deque[int]
    num_running: int = 0
    prefix_row: int = -1
    weight_version: int = 0  # of the prefill
    first_logits: torch.Tensor | None = None  # [1, vocab], while samples wait for their first token

    @property
    def shares_prompt(self) -> bool:
        return len(self.request.seeds) > 1

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def own_tokens(self) -> int:
        """KV positions one sample's row must be able to hold."""
        own_prompt = 0 if self.shares_prompt else self.num_prompt_tokens
        return own_prompt + self.request.params.max_new_tokens

    @property
    def prefix_tokens(self) -> int:
        """KV positions the shared prompt takes."""
        return self.num_prompt_tokens if self.shares_prompt else 0


@dataclass(eq=False)
class SampleState:
    """One sample while it is generated. ``token_ids`` starts with the prompt; the last token is not in the KV yet."""

    group: Group
    sample_index: int
    key: int
    token_ids: list[int]
    coins: list[float]
    logprobs: list[float] = field(default_factory=list)
    accepted_histogram: list[int] = field(default_factory=list)
    num_drafted: int = 0
    num_empty_rounds: int = 0

    @property
    def num_generated(self) -> int:
        return len(self.logprobs)

    @property
    def num_remaining(self) -> int:
        return self.group.request.params.max_new_tokens - self.num_generated

    @property
    def own_len(self) -> int:
        """Positions of the row that hold committed KV."""
        return len(self.token_ids) - 1 - self.group.prefix_tokens

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens whose KV the group's first sample had computed when this one started."""
        return self.group.num_prompt_tokens if self.sample_index > 0 and self.num_generated else 0

    def count_round(self, num_drafted: int, num_accepted: int) -> None:
        self.num_drafted += num_drafted
        self.num_empty_rounds += num_drafted == 0
        missing = num_accepted + 1 - len(self.accepted_histogram)
        self.accepted_histogram.extend([0] * max(0, missing))
        self.accepted_histogram[num_accepted] += 1

    def finished(self, ending: Ending, now_s: float, drafts_per_round: int, engine: int) -> GeneratedSample:
        """The sample as it stands; ``drafts_per_round`` is num_draft_tokens - 1."""
        num_rounds = sum(self.accepted_histogram)
        return GeneratedSample(
            group_id=self.group.request.group_id,
            sample_index=self.sample_index,
            token_ids=tuple(self.token_ids[self.group.num_prompt_tokens :]),
            logprobs=tuple(self.logprobs),
            finish_reason=ending.reason,
            matched_stop=ending.matched,
            weight_version=self.group.weight_version,
            num_prompt_tokens=self.group.num_prompt_tokens,
            cached_tokens=self.num_cached_tokens,
            spec=SpecCounters(
                num_rounds=num_rounds,
                num_proposed=num_rounds * drafts_per_round,
                histogram=tuple(self.accepted_histogram),
                num_drafted=self.num_drafted,
                num_empty_rounds=self.num_empty_rounds,
            ),
            e2e_latency_s=now_s - self.group.arrival_s,
            engine=engine,
        )


def coins_of(seed: int, count: int) -> list[float]:
    """The uniforms of one sample: coin t decides generated token t, whatever else runs in the batch."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64).tolist()
