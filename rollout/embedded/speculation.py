"""The core calls the drafter through Speculation: only for requests that speculate, within limits, and timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch

from rollout.embedded.batch import Batch
from rollout.embedded.draft import NO_DRAFT, Draft
from rollout.embedded.drafting import DraftContext, Drafter, LearningDrafter, Outcome, Prefill
from rollout.embedded.plan import RowSpan, tree_shape
from rollout.embedded.request import Group, SampleState
from rollout.embedded.target import PassOutput, Target, Timing
from rollout.embedded.unread import AnyDraft
from rollout.embedded.verification.verifier import Verified
from slime_spec.sglang.draft_shape import DraftShape


@dataclass
class Speculation:
    """Makes the core's calls of a drafter; ``enabled`` is False where the engine does not speculate at all."""

    drafter: Drafter
    shape: DraftShape
    enabled: bool
    target: Target
    timing: Timing
    clock: Callable[[], float]

    @property
    def headroom(self) -> int:
        """Return the number of KV slots that a row needs beyond its tokens."""
        return self.shape.headroom if self.enabled else 0

    def applies_to(self, group: Group) -> bool:
        return self.enabled and group.request.params.speculative

    def prefill(self, prefills: Sequence[Prefill]) -> None:
        """Show the drafter the pieces of one pass, all of groups that speculate."""
        if prefills:
            with self._timed():
                self.drafter.prefill(prefills)

    def propose(self, batch: Batch) -> list[AnyDraft]:
        """Return a draft for every running sequence, no deeper than its token budget allows."""
        drafts: list[AnyDraft] = [NO_DRAFT] * batch.num_running
        rows, contexts = [], []
        for row, sequence in enumerate(batch.running):
            max_depth = min(self.shape.num_steps, sequence.num_remaining - 1)
            if max_depth > 0 and self.applies_to(sequence.group):
                rows.append(row)
                contexts.append(self._context(batch, row, max_depth))
        if contexts:
            with self._timed():
                proposed = self.drafter.propose(contexts)
            for row, context, draft in zip(rows, contexts, proposed, strict=True):
                _check(draft, context)
                drafts[row] = draft
        return drafts

    def observe(self, batch: Batch, output: PassOutput, spans: Sequence[RowSpan], verified: Sequence[Verified]) -> None:
        """Report the accepted nodes to the drafter, with the target's features of every root and accepted node."""
        running = batch.running
        rows = [row for row, each in enumerate(running) if self.applies_to(each.group)]
        if not rows:
            return
        first_token = [0, *accumulate(span.count for span in spans)]
        committed = [[first_token[row], *(first_token[row] + 1 + node for node in verified[row].path)] for row in rows]
        features: Sequence[torch.Tensor | None] = [None] * len(rows)
        if self.drafter.needs.any:
            index = self.target.tensor([token for tokens in committed for token in tokens])
            gathered = self.target.features(output[index])
            assert gathered is not None, "needed features are captured"
            features = gathered.split([len(tokens) for tokens in committed])
        keys = [running[row].key for row in rows]
        paths = [verified[row].path for row in rows]
        with self._timed():
            self.drafter.observe([Outcome(*each) for each in zip(keys, paths, features, strict=True)])

    def finish(self, sequence: SampleState) -> None:
        """Show a finished sample to a drafter that learns from it, where others of its group go on."""
        group = sequence.group
        if isinstance(self.drafter, LearningDrafter) and group.num_unfinished > 1 and self.applies_to(group):
            with self._timed():
                self.drafter.finished(group.key, sequence.token_ids, group.num_prompt_tokens)

    def end(self, group: Group) -> None:
        """Have a drafter drop what it learned of a group that has no unfinished sample."""
        if isinstance(self.drafter, LearningDrafter) and self.applies_to(group):
            self.drafter.ended(group.key)

    def forget(self, sequence: SampleState) -> None:
        """Drop the drafter's state of a sequence that has left the batch, finished or preempted."""
        if self.applies_to(sequence.group):
            self.drafter.forget(sequence.key)

    def forget_prompt(self, group: Group) -> None:
        if self.applies_to(group):
            self.drafter.forget(group.key)

    def _context(self, batch: Batch, row: int, max_depth: int) -> DraftContext:
        sequence = batch.sequences[row]
        group = sequence.group
        return DraftContext(
            request_key=sequence.key,
            prompt_key=group.key,
            kv_row=batch.kv_row(row),
            token_ids=sequence.token_ids,
            num_prompt_tokens=group.num_prompt_tokens,
            max_draft_tokens=self.shape.num_draft_tokens - 1,
            max_depth=max_depth,
            params=group.request.params,
            uniforms=sequence.uniforms.draft_of_round(sequence.num_generated),
            earlier=group.request.earlier,
        )

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = self.clock()
        yield
        self.timing.draft_s += self.clock() - start


def _check(draft: AnyDraft, context: DraftContext) -> None:
    assert draft.num_tokens <= context.max_draft_tokens, "a drafter proposed more than it was allowed"
    if isinstance(draft, Draft) and draft.token_ids:
        _, depths = tree_shape(draft.parents)
        assert depths.max() < context.max_depth, "a drafter proposed deeper than it was allowed"
