"""A Group has samples that share one prompt; a SampleState is the state of one sample while it is generated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from rollout.embedded.draft import Draft
from rollout.embedded.logprobs import LogprobRecord, Wanted
from rollout.embedded.stop import Ending
from rollout.embedded.uniforms import Uniforms
from rollout.embedded.unread import AnyDraft
from rollout.embedded.verification.verifier import VerifyRow
from slime_spec.errors import GenerationError
from slime_spec.partial_samples import earlier_part, note_version, reported_spans, rounds_are_known
from slime_spec.routed_experts import RoutedExperts
from slime_spec.sglang.draft_shape import DraftShape
from slime_spec.types import GeneratedSample, GroupRequest, SpecCounters, VersionSpan


@dataclass(frozen=True)
class Progress:
    """Holds what a round added to a sample: ``Progress(sample_index=0, token_ids=(17, 4), logprobs=(-0.1, -2.3))``."""

    sample_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    def joined(self, later: Progress) -> Progress:
        """Return what this round and a later one added to the sample."""
        return Progress(self.sample_index, self.token_ids + later.token_ids, self.logprobs + later.logprobs)


@dataclass(frozen=True)
class Stamp:
    """Holds the facts of an engine that every sample of the engine carries."""

    engine: int
    shape: DraftShape
    lossy: bool
    is_automatic: bool = False  # the engine decides how deep to draft


OnSample = Callable[[GeneratedSample], None]
OnProgress = Callable[[Progress], None]
OnFailure = Callable[[GenerationError], None]


@dataclass(eq=False)
class Group:
    """Holds one request on its way through the engine, and the KV of its prompt where samples share the KV."""

    request: GroupRequest
    arrival_s: float
    on_sample: OnSample
    key: int
    on_progress: OnProgress | None = None
    on_failure: OnFailure | None = None
    record: LogprobRecord | None = None  # of what its caller wants besides
    num_unfinished: int = 0
    num_in_batch: int = 0
    num_started: int = 0  # samples that have their first token
    prefix_row: int = -1
    num_prefilled: int = 0  # prompt positions in the prefix row
    num_copied: int = 0  # of them, from a prompt that was kept
    kv_version: int = 0  # oldest weights that computed the prompt's KV
    prompt_version: int = 0  # weights that computed ``first_logits``
    first_logits: torch.Tensor | None = None  # [1, vocab], while samples wait for their first token
    features: list[torch.Tensor] = field(default_factory=list)  # for the drafter, of positions prefilled so far
    prompt: list[int] = field(default_factory=list)  # the token_ids of its samples that wait and have none of their own

    def __post_init__(self) -> None:
        self.prompt += self.request.prompt_token_ids
        self.num_unfinished = len(self.request.seeds)
        self.num_started = sum(bool(partial.token_ids) for partial in self.request.partials)

    @cached_property
    def shares_prompt(self) -> bool:
        return len(self.request.seeds) > 1

    @cached_property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @cached_property
    def prefix_tokens(self) -> int:
        """Return the number of KV positions that the shared prompt takes."""
        return self.num_prompt_tokens if self.shares_prompt else 0

    @property
    def wanted(self) -> Wanted | None:
        return None if self.record is None else self.record.wanted

    @property
    def scores_prompt(self) -> bool:
        return self.record is not None and self.record.of_prompt

    @property
    def prefix_ready(self) -> bool:
        return self.num_prefilled == self.prefix_tokens

    def drop_prompt(self) -> None:
        """Note that the prompt's KV is gone."""
        self.prefix_row, self.num_prefilled, self.first_logits = -1, 0, None
        self.features.clear()


@dataclass(eq=False)
class SampleState:
    """Holds one sample while it is generated; ``token_ids`` starts with the prompt, and its last is not in the KV yet.

    A resumed sample holds its earlier part's tokens, times and counts from the start.
    """

    group: Group
    sample_index: int
    key: int  # samples are as old as their keys
    token_ids: list[int]
    uniforms: Uniforms
    logprobs: list[float] = field(default_factory=list)
    accepted_histogram: list[int] = field(default_factory=list)
    num_drafted: int = 0
    num_tried: list[int] = field(default_factory=list)
    num_asked: int = 0  # drafts, where the engine decides how deep to draft
    num_off_steps: int = 0
    num_empty_rounds: int = 0
    num_nonfinite_rounds: int = 0
    num_preemptions: int = 0
    cached_tokens: int = 0
    spent_s: float = 0.0  # in earlier parts
    lossy: bool = False  # the earlier part was
    rounds_known: bool = True
    num_prefilled: int = 0  # slots of the row filled so far, while it is being prefilled
    num_copied: int = 0  # of them, from a prompt that was kept
    features: list[torch.Tensor] = field(default_factory=list)  # for the drafter, of slots prefilled so far
    kv_version: int = 0  # oldest weights that computed its KV
    oldest_version: int | None = None  # of the weights that had a part in its tokens, by logits or by KV
    draft_version: int | None = None  # of the draft that drafted first, where drafts have weights
    wait_s: float | None = None  # from arrival to a row
    first_token_s: float | None = None  # from arrival to the first token
    version_spans: list[VersionSpan] = field(default_factory=list)
    routed_experts: RoutedExperts | None = None  # as far as its KV was given up, or an earlier part had them

    @classmethod
    def of(cls, group: Group, position: int, key: int, speculates: bool) -> SampleState:
        """Return the sample of a group's seed, new or resumed from its earlier part, whatever the params are.

        Stop strings and penalties look at all its tokens, and its uniforms are those of its seed at every token: where
        the weights are the same, a resumed sample becomes the sample that would have been generated without a break.
        """
        request = group.request
        uniforms = Uniforms(request.seeds[position], request.params.max_new_tokens)
        part = earlier_part(request, position)
        state = cls(group, part.sample_index, key, group.prompt, uniforms)
        state._take_part(part, speculates)
        return state

    def own_tokens(self) -> None:
        """Copy the prompt, which samples share until they run: thousands of them may wait."""
        if self.token_ids is self.group.prompt:
            self.token_ids = list(self.group.prompt)

    @property
    def num_generated(self) -> int:
        return len(self.logprobs)

    @property
    def num_remaining(self) -> int:
        return self.group.request.params.max_new_tokens - self.num_generated

    @property
    def own_len(self) -> int:
        """Return the number of slots of the row that hold committed KV, once the row is prefilled."""
        return len(self.token_ids) - 1 - self.group.prefix_tokens

    @property
    def prefill_len(self) -> int:
        """Count slots to fill before it runs: all tokens but the last, or the whole prompt if nothing was generated."""
        return self.own_len + (not self.logprobs)

    @property
    def prefilled(self) -> bool:
        return self.group.prefix_ready and self.num_prefilled == self.prefill_len

    def note_first_token(self, now_s: float) -> None:
        """Note that the first token was drawn, and how much of the prompt had not to be computed for it."""
        group = self.group
        copied = group.num_copied if group.shares_prompt else self.num_copied
        self.cached_tokens = group.num_prompt_tokens if group.num_started else copied
        self.first_token_s = self.elapsed_s(now_s)
        group.num_started += 1
        if group.num_started == len(group.request.seeds):
            group.first_logits = None

    def note_version(self, version: int) -> None:
        """Note that weights of ``version`` give the next tokens."""
        note_version(self.version_spans, self.num_generated, version)
        # Noted here, because recomputed KV forgets whose KV the tokens before it were drawn from.
        known = version if self.oldest_version is None else self.oldest_version
        self.oldest_version = min(known, self.kv_version, version)

    def note_routing(self, of_kv: RoutedExperts | None) -> None:
        """Note the experts that computed its KV; of recomputed KV the first ones count, which made the logprobs."""
        known = self.routed_experts
        self.routed_experts = of_kv if known is None or of_kv is None else known.completed(of_kv)

    def verify_row(self, draft: AnyDraft) -> VerifyRow:
        """Return what a verifier must know of the sample to judge its draft."""
        group = self.group
        return VerifyRow(
            draft=draft,
            params=group.request.params,
            uniforms=self.uniforms,
            token_ids=self.token_ids,
            num_prompt_tokens=group.num_prompt_tokens,
            wanted=group.wanted,
        )

    def append(self, token_id: int, logprob: float) -> None:
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)

    def progress_since(self, num_generated: int) -> Progress:
        new = slice(self.group.num_prompt_tokens + num_generated, None)
        return Progress(self.sample_index, tuple(self.token_ids[new]), tuple(self.logprobs[num_generated:]))

    def count_round(self, draft: Draft, num_accepted: int, depth: int, stamp: Stamp) -> None:
        """Count one round, for which a draft of ``depth`` was asked; 0 where the engine chose a plain step."""
        if stamp.is_automatic:
            if not depth:
                self.num_off_steps += 1
                return
            self._count_tried(depth, num_accepted)
        self.num_drafted += len(draft.token_ids)
        self.num_empty_rounds += not draft.token_ids
        self.num_nonfinite_rounds += draft.nonfinite
        missing = num_accepted + 1 - len(self.accepted_histogram)
        self.accepted_histogram.extend([0] * max(0, missing))
        self.accepted_histogram[num_accepted] += 1

    def _count_tried(self, depth: int, num_accepted: int) -> None:
        tried = min(depth, num_accepted + 1)
        self.num_tried.extend([0] * (tried - len(self.num_tried)))
        for position in range(tried):
            self.num_tried[position] += 1
        self.num_asked += depth

    def elapsed_s(self, now_s: float) -> float:
        """Time since the sample's arrival, the time of earlier parts included."""
        return self.spent_s + now_s - self.group.arrival_s

    def finished(self, ending: Ending, now_s: float, stamp: Stamp, version: int) -> GeneratedSample:
        """Return the sample as it stands; a sample without tokens reports ``version``, that of the weights in use."""
        oldest = version if self.oldest_version is None else self.oldest_version
        return GeneratedSample(
            group_id=self.group.request.group_id,
            sample_index=self.sample_index,
            token_ids=tuple(self.token_ids[self.group.num_prompt_tokens :]),
            logprobs=tuple(self.logprobs),
            finish_reason=ending.reason,
            matched_stop=ending.matched,
            weight_version=oldest,
            version_spans=reported_spans(self.version_spans, oldest),
            draft_version=self.draft_version,
            num_prompt_tokens=self.group.num_prompt_tokens,
            cached_tokens=self.cached_tokens,
            num_preemptions=self.num_preemptions,
            spec=self._counters(stamp) if self.rounds_known else SpecCounters(),
            e2e_latency_s=self.elapsed_s(now_s),
            wait_s=self.wait_s,
            first_token_s=self.first_token_s,
            engine=stamp.engine,
            lossy=stamp.lossy or self.lossy,
            routed_experts=self.routed_experts,
        )

    def _counters(self, stamp: Stamp) -> SpecCounters:
        num_rounds, shape = sum(self.accepted_histogram), stamp.shape
        per_round = num_rounds * (shape.num_draft_tokens - 1)
        return SpecCounters(
            num_rounds=num_rounds,
            num_proposed=self.num_asked if stamp.is_automatic else per_round,
            histogram=tuple(self.accepted_histogram),
            num_drafted=self.num_drafted,
            num_empty_rounds=self.num_empty_rounds,
            num_steps=shape.num_steps,
            num_nonfinite_rounds=self.num_nonfinite_rounds,
            num_tried=tuple(self.num_tried),
            num_off_steps=self.num_off_steps,
        )

    def _take_part(self, part: GeneratedSample, speculates: bool) -> None:
        """Take over the tokens, times and counts of the sample's earlier part."""
        self.spent_s, self.wait_s, self.first_token_s = part.e2e_latency_s, part.wait_s, part.first_token_s
        self.num_preemptions, self.cached_tokens = part.num_preemptions, part.cached_tokens
        if part.token_ids:
            self.token_ids = [*self.group.prompt, *part.token_ids]
        self.logprobs += part.logprobs
        self.version_spans += part.spans
        self.routed_experts = part.routed_experts
        self.oldest_version = part.weight_version if part.token_ids else None
        self.draft_version, self.lossy = part.draft_version, part.lossy
        self.rounds_known = not speculates or rounds_are_known(len(part.token_ids), part.spec)
        self.accepted_histogram += part.spec.histogram
        self.num_tried += part.spec.num_tried
        self.num_off_steps, self.num_asked = part.spec.num_off_steps, part.spec.num_proposed
        self.num_drafted, self.num_empty_rounds = part.spec.num_drafted, part.spec.num_empty_rounds
        self.num_nonfinite_rounds = part.spec.num_nonfinite_rounds
