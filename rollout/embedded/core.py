"""Continuous batching without threads: groups in, rounds of draft and verify, finished samples out.

    step():  admit waiting groups (prefill each prompt once) ──► one round over every running sequence
    round:   propose drafts ─ one forward over [last token, drafts] of every row ─ draw at every node ─ accept ─ emit

The caller owns the thread; nothing here blocks or locks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rollout.embedded.attention import RowSpan, make_plan
from rollout.embedded.batch import Batch
from rollout.embedded.kv_cache import KvCache, KvStore
from rollout.embedded.model import Decoder
from rollout.embedded.request import Group, OnSample, SampleState, coins_of
from rollout.embedded.sampler import sample
from rollout.embedded.stop import Ending, StopRule
from rollout.embedded.verify import ChainRule, follow_chain
from slime_spec.interfaces import Draft, DraftContext, Drafter
from slime_spec.types import GroupRequest

# Longer prompts are prefilled in pieces, which bounds the attention mask and the activations.
PREFILL_CHUNK_TOKENS = 1024
NO_DRAFT = Draft(token_ids=(), parents=())
ABORTED = Ending("abort")


@dataclass(frozen=True)
class CoreSettings:
    """What the core is told once; ``num_draft_tokens`` counts the root."""

    num_draft_tokens: int
    speculates: bool
    max_running: int
    engine_index: int
    dtype: torch.dtype
    device: torch.device


@dataclass
class Timing:
    """Seconds since start: inside the forward pass, and inside ``step`` altogether."""

    forward_s: float = 0.0
    total_s: float = 0.0


class GenerationCore:
    """Owns the running batch, the KV cache and the weights in use; one thread calls it."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KvCache,
        drafter: Drafter,
        stop_rule: StopRule,
        settings: CoreSettings,
        clock: Callable[[], float],
        chain_rule: ChainRule = follow_chain,
    ) -> None:
        self.decoder, self.cache, self.version = decoder, cache, 0
        self.timing = Timing()
        self.batch = Batch(cache, settings.max_running)
        self.waiting: deque[Group] = deque()
        self._drafter, self._stop_rule, self._settings = drafter, stop_rule, settings
        self._clock, self._chain_rule = clock, chain_rule
        self._next_key = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.batch.sequences)

    @property
    def num_waiting(self) -> int:
        return sum(len(group.waiting) for group in list(self.waiting))

    def add(self, request: GroupRequest, on_sample: OnSample) -> Group:
        """Queue a validated group."""
        samples = deque(range(len(request.seeds)))
        group = Group(request, self._clock(), on_sample, samples, weight_version=self.version)
        self.waiting.append(group)
        return group

    def abort(self, group: Group) -> None:
        """Finish the group's samples with what they have; those already finished are not touched."""
        if group in self.waiting:
            self.waiting.remove(group)
        rows = [row for row, each in enumerate(self.batch.sequences) if each.group is group]
        never_started = list(group.waiting)
        group.waiting.clear()
        self._finish([(row, ABORTED) for row in rows])
        for index in never_started:
            group.on_sample(self._new_sequence(group, index).finished(ABORTED, self._clock(), 0, self._engine))
        self.batch.release_prefix(group)

    def step(self) -> None:
        """Admit what fits, then run one round."""
        start = self._clock()
        self._admit()
        if self.batch.sequences:
            self._round()
        self.timing.total_s += self._clock() - start

    def _admit(self) -> None:
        # First come, first served: a large group at the head waits for room rather than being overtaken for ever.
        while self.waiting and (count := self.batch.room_for(self.waiting[0])):
            group = self.waiting[0]
            self.batch.reserve(group, count)
            self._start(group, count)
            if not group.waiting:
                self.waiting.popleft()
                group.first_logits = None

    def _start(self, group: Group, count: int) -> None:
        """Prefill the prompt unless that was done, and draw the first token of the next ``count`` samples."""
        if group.first_logits is None:
            row = group.prefix_row if group.shares_prompt else len(self.batch.sequences)
            store = self.cache.prefixes if group.shares_prompt else self.cache.own
            group.weight_version = self.version
            group.first_logits = self._prefill(store, row, group.request.prompt_token_ids)
        params = group.request.params
        started = [self._new_sequence(group, group.waiting.popleft()) for _ in range(count)]
        rows = [self.batch.add(sequence) for sequence in started]
        drawn = sample(
            group.first_logits.expand(count, -1), [params] * count, [sequence.coins[0] for sequence in started]
        )
        finished = []
        for row, sequence, token_id, logprob in zip(rows, started, drawn.token_ids, drawn.logprobs, strict=True):
            ending = self._emit(sequence, [token_id], [logprob])
            if ending is not None:
                finished.append((row, ending))
        self._finish(finished)

    def _new_sequence(self, group: Group, sample_index: int) -> SampleState:
        self._next_key += 1
        request = group.request
        return SampleState(
            group=group,
            sample_index=sample_index,
            key=self._next_key,
            token_ids=list(request.prompt_token_ids),
            coins=coins_of(request.seeds[sample_index], request.params.max_new_tokens),
        )

    def _prefill(self, store: KvStore, row: int, prompt: Sequence[int]) -> torch.Tensor:
        """Fill the prompt's KV; the logits [1, vocab] after its last token."""
        for start in range(0, len(prompt), PREFILL_CHUNK_TOKENS):
            piece = prompt[start : start + PREFILL_CHUNK_TOKENS]
            hidden = self._forward(store, [RowSpan(row, start, len(piece))], piece)
        return self._logits(hidden[-1:])

    def _round(self) -> None:
        """One draft and one verify for every running sequence."""
        sequences = self.batch.sequences
        drafts = self._propose(sequences)
        spans = [self.batch.span(row, 1 + len(draft.token_ids)) for row, draft in enumerate(drafts)]
        inputs: list[int] = []
        params, coins = [], []
        for sequence, draft in zip(sequences, drafts, strict=True):
            tokens = (sequence.token_ids[-1], *draft.token_ids)
            inputs.extend(tokens)
            params.extend([sequence.group.request.params] * len(tokens))
            coins.extend(sequence.coins[sequence.num_generated : sequence.num_generated + len(tokens)])
        drawn = sample(self._logits(self._forward(self.cache.own, spans, inputs)), params, coins)
        finished: list[tuple[int, Ending]] = []
        first = 0
        for row, (sequence, draft) in enumerate(zip(sequences, drafts, strict=True)):
            end = first + 1 + len(draft.token_ids)
            emitted = self._chain_rule(drawn.token_ids[first:end], draft.token_ids)
            num_accepted = len(emitted) - 1
            if self._settings.speculates and sequence.group.request.params.speculative:
                sequence.count_round(len(draft.token_ids), num_accepted)
                self._drafter.observe(sequence.key, num_accepted)
            ending = self._emit(sequence, emitted, drawn.logprobs[first : first + len(emitted)])
            if ending is not None:
                finished.append((row, ending))
            first = end
        self._finish(finished)

    def _propose(self, sequences: Sequence[SampleState]) -> list[Draft]:
        """A chain per sequence, short enough that the round cannot exceed the sequence's token budget."""
        rows, contexts = [], []
        for row, sequence in enumerate(sequences):
            limit = min(self._settings.num_draft_tokens, sequence.num_remaining) - 1
            if limit > 0 and self._settings.speculates and sequence.group.request.params.speculative:
                rows.append(row)
                contexts.append(DraftContext(sequence.key, sequence.token_ids, sequence.group.num_prompt_tokens, limit))
        drafts = [NO_DRAFT] * len(sequences)
        if contexts:
            for row, context, draft in zip(rows, contexts, self._drafter.propose(contexts), strict=True):
                assert len(draft.token_ids) <= context.max_draft_tokens, "a drafter proposed more than it was allowed"
                assert draft.parents == tuple(range(-1, len(draft.token_ids) - 1)), "only chains are verified"
                assert draft.q_draft is None, "only point-mass drafts are verified"
                drafts[row] = draft
        return drafts

    def _forward(self, store: KvStore, spans: Sequence[RowSpan], token_ids: Sequence[int]) -> torch.Tensor:
        settings, spec = self._settings, self.decoder.spec
        start = self._clock()
        shared = self.cache.prefixes if any(span.prefix_row >= 0 for span in spans) else None
        heads_per_kv = spec.num_heads // spec.num_kv_heads
        plan = make_plan(store, spans, heads_per_kv, settings.dtype, settings.device, shared)
        hidden = self.decoder.hidden(torch.tensor(token_ids, device=settings.device), plan)
        self.timing.forward_s += self._synchronised() - start
        return hidden

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        start = self._clock()
        logits = self.decoder.logits(hidden)
        self.timing.forward_s += self._synchronised() - start
        return logits

    def _synchronised(self) -> float:
        """The time once the device has done what was queued."""
        if self._settings.device.type == "cuda":
            torch.cuda.synchronize(self._settings.device)
        return self._clock()

    def _emit(self, sequence: SampleState, token_ids: list[int], logprobs: list[float]) -> Ending | None:
        """Append tokens up to the first that ends the response, and say why it ended."""
        params, start = sequence.group.request.params, sequence.group.num_prompt_tokens
        for token_id, logprob in zip(token_ids, logprobs, strict=True):
            sequence.token_ids.append(token_id)
            sequence.logprobs.append(logprob)
            ending = self._stop_rule.ending(sequence.token_ids, start, params)
            if ending is not None:
                return ending
        return None

    def _finish(self, finished: list[tuple[int, Ending]]) -> None:
        """Hand out finished samples and free their rows, highest row first so that rows below keep their numbers."""
        for row, ending in sorted(finished, key=lambda pair: pair[0], reverse=True):
            sequence = self.batch.sequences[row]
            self.batch.remove(row)
            self._drafter.forget(sequence.key)
            drafts_per_round = self._settings.num_draft_tokens - 1
            sequence.group.on_sample(sequence.finished(ending, self._clock(), drafts_per_round, self._engine))

    @property
    def _engine(self) -> int:
        return self._settings.engine_index
