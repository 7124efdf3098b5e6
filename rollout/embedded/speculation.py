"""The core calls the drafter through Speculation: only for requests that speculate, as deep as pays, and timed.

    start      calibrate          times passes, for the costs that the controller weighs
    a round    plan ─► propose    the controller says which sequences draft and how deep, if the depth is automatic
               verify (core)
               observe            the drafter hears of every sequence, whether it drafted or not
               note               the controller learns what was accepted and what it took

Without a controller every sequence drafts in every round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from rollout.embedded.batch import Batch
from rollout.embedded.candidates import candidate, tells_worth
from rollout.embedded.draft import NO_DRAFT, Draft
from rollout.embedded.drafting import DraftContext, Drafter, LearningDrafter, Outcome, Prefill
from rollout.embedded.plan import RowSpan, tree_shape
from rollout.embedded.reading import Reading
from rollout.embedded.request import Group, SampleState
from rollout.embedded.target import PassOutput, Target, Timing
from rollout.embedded.tempering import Tempering
from rollout.embedded.unread import AnyDraft, UnreadDraft
from rollout.embedded.verification.verifier import Verified
from slime_spec.sglang.draft_shape import DraftShape
from slime_spec.speculation.confidence import StopRule
from slime_spec.speculation.controller import Controller, RoundPlan, RowState
from slime_spec.speculation.net_benefit import NetBenefit
from slime_spec.speculation.plain_schedule import PlainSchedule
from slime_spec.speculation.remaining import RemainingTokens
from slime_spec.speculation.round_costs import RoundCosts

# The report of the batch up to which drafting pays: for contexts of so many tokens, made anew after so many seconds.
TYPICAL_CONTEXT = 128
REPORT_S = 5.0
MOST_SCHEDULED = 4096  # sequences: a batch that is never empty is settled after so many
MOST_WAITING_BYTES = 256 << 20  # of features that the drafter has not read


@dataclass(frozen=True)
class Proposal:
    """Holds a round's drafts, one per running sequence, and the depths that were planned; 0 is a plain step."""

    drafts: list[AnyDraft]
    depths: tuple[int, ...]
    num_asked: int = 0  # sequences that a network was asked for, the others' drafts came out of texts
    num_steps: int = 0  # of the network
    backlog: int = 0  # tokens that the network read first
    draft_s: float = 0.0

    @property
    def num_drafting(self) -> int:
        return sum(depth > 0 for depth in self.depths)


@dataclass
class Speculation:
    """Makes the core's calls of a drafter; ``enabled`` is False where the engine does not speculate at all."""

    drafter: Drafter
    shape: DraftShape
    enabled: bool
    target: Target
    timing: Timing
    clock: Callable[[], float]
    cost_clock: Callable[[], float]
    cuts_network: bool = False  # or stops it, by its confidence
    controller: Controller | None = None
    costs: RoundCosts | None = None
    tempering: Tempering | None = None  # where drafts are sampled
    benefit: NetBenefit = field(default_factory=NetBenefit)
    remaining: RemainingTokens = field(default_factory=RemainingTokens)
    _schedule: PlainSchedule = field(default_factory=PlainSchedule)
    _settled: NetBenefit = field(default_factory=NetBenefit)  # as of the schedule's beginning
    _running: set[int] = field(default_factory=set)  # requests of the last round that have not left since
    _reading: Reading = field(init=False)
    _reads_texts: bool = field(init=False)  # before a network
    _draft_cost_s: float = 0.0
    drafted_last: bool = False  # in the last round, some sequence
    pays_up_to: int | None = None  # the largest batch at which drafting pays, as of late; None where the depth is fixed
    _max_running: int = 0
    _reported_at_s: float = 0.0

    def __post_init__(self) -> None:
        self._reading = Reading(self.drafter)
        self._reads_texts = self.has_network and isinstance(self.drafter, LearningDrafter)

    @property
    def headroom(self) -> int:
        """Return the number of KV slots that a row needs beyond its tokens."""
        return self.shape.headroom if self.enabled else 0

    def applies_to(self, group: Group) -> bool:
        return self.enabled and group.request.params.speculative

    def use_costs(self, costs: RoundCosts, is_automatic: bool, max_running: int) -> None:
        """Predict rounds with ``costs`` from now on, and let a controller decide where the depth is automatic."""
        self.costs = costs
        if is_automatic:
            shape = self.shape
            cuts = self.has_network and self.cuts_network
            self.controller = Controller(costs, shape.num_steps, shape.num_draft_tokens - 1, not self.has_network, cuts)
            self._max_running = max_running
            self._report(self.controller)

    @property
    def draft_temperature(self) -> float | None:
        """Return the temperature that sampled drafts have now, None where drafts are not sampled."""
        return None if self.tempering is None else self.tempering.temperature

    @property
    def has_network(self) -> bool:
        return self.drafter.weights is not None

    def prefill(self, prefills: Sequence[Prefill]) -> None:
        """Show the drafter the pieces of one pass, all of groups that speculate."""
        if prefills:
            self._reading.prefilled(prefills)
            with self._timed():
                self.drafter.prefill(prefills)

    def propose(self, batch: Batch) -> Proposal:
        """Return a draft for every running sequence, no deeper than its token budget allows."""
        self._catch_up(batch)
        limits = [
            min(self.shape.num_steps, each.num_remaining - 1) if self.applies_to(each.group) else 0
            for each in batch.running
        ]
        plan = self._plan(batch, limits)
        before_s = self._draft_cost_s
        rows = self._rows_that_draft(plan, limits)
        drafts = self._drafted(batch, self._contexts(batch, rows, plan, limits), rows)
        asked = [row for row, depth in enumerate(plan.depths) if depth and self.has_network]
        asked = [row for row in asked if not drafts[row].is_of_text]
        backlog = sum(self._reading.backlog(batch.sequences[row]) for row in asked)
        self._reading.drafted([batch.sequences[row] for row in asked])
        num_steps = max((_depth(drafts[row], plan.depths[row]) for row in asked), default=0)
        if self.controller is not None and any(tells_worth(draft, self.has_network) for draft in drafts):
            candidates = [candidate(draft, self.controller, self.has_network) for draft in drafts]
            kept = self.controller.keep(self._states(batch, limits), candidates, plan.is_probe)
            drafts = [_first(draft, count) for draft, count in zip(drafts, kept, strict=True)]
        depths = plan.depths if self.controller is None else tuple(map(_depth, drafts, plan.depths))
        return Proposal(drafts, depths, len(asked), num_steps, backlog, self._draft_cost_s - before_s)

    def _plan(self, batch: Batch, limits: Sequence[int]) -> RoundPlan:
        if self.controller is None:
            return RoundPlan(tuple(limits))
        return self.controller.again(limits) or self.controller.plan(self._states(batch, limits))

    def _rows_that_draft(self, plan: RoundPlan, limits: Sequence[int]) -> list[int]:
        """Return the rows to ask for drafts: of texts before a network, all that may draft."""
        texts_help = self._reads_texts and not plan.is_probe and (plan.drafts or plan.texts_may_pay)
        depths = limits if texts_help else plan.depths
        return [row for row, depth in enumerate(depths) if depth]

    def _contexts(
        self, batch: Batch, rows: Sequence[int], plan: RoundPlan, limits: Sequence[int]
    ) -> list[DraftContext]:
        """Return what drafters are asked with: a network for the depth of the plan, texts for all that fits."""
        depths = limits if self._reads_texts and self.controller is not None else plan.depths
        contexts = [self._context(batch, row, depths[row], plan.depths[row], plan.stop) for row in rows]
        return contexts if self.tempering is None else self.tempering.tempered(contexts, rows)

    def _drafted(self, batch: Batch, contexts: Sequence[DraftContext], rows: Sequence[int]) -> list[AnyDraft]:
        drafts: list[AnyDraft] = [NO_DRAFT] * batch.num_running
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
            tokens = [token for tokens in committed for token in tokens]
            # Where nothing was refused, as in rounds without drafts, all are wanted as they lie.
            wanted = output if tokens == list(range(first_token[-1])) else output[self.target.tensor(tokens)]
            gathered = self.target.features(wanted)
            assert gathered is not None, "needed features are captured"
            features = gathered.split([len(tokens) for tokens in committed])
        keys = [running[row].key for row in rows]
        paths = [verified[row].path for row in rows]
        prompts, nodes = [running[row].group.key for row in rows], [spans[row].count - 1 for row in rows]
        with self._timed():
            self.drafter.observe([Outcome(*each) for each in zip(keys, paths, features, prompts, nodes, strict=True)])

    def note(self, batch: Batch, proposal: Proposal, verified: Sequence[Verified], seconds: float) -> None:
        """Learn from a round that took ``seconds``, drafting and observing included."""
        self.drafted_last = proposal.num_drafting > 0
        if self.costs is None:
            return
        running, draft_s = batch.running, proposal.draft_s
        counts = [1 + draft.num_tokens for draft in proposal.drafts]
        contexts = [len(each.token_ids) for each in running]
        attended = sum(count * context for count, context in zip(counts, contexts, strict=True))
        if not proposal.num_drafting:
            self.benefit = self.benefit.with_plain(seconds)
        else:
            step_s, error = self.costs.pass_s(len(running), sum(contexts)), self.costs.relative_error
            if self.has_network and proposal.num_asked:
                self.costs.observe_draft(proposal.num_asked, proposal.num_steps, proposal.backlog, draft_s)
            num_tokens = sum(1 + len(each.path) for each in verified)
            self.benefit = self.benefit.with_round(seconds, len(running), num_tokens, step_s, error)
        self.costs.observe_pass(sum(counts), attended, seconds - draft_s)
        self._schedule.round({each.key: 1 + len(one.path) for each, one in zip(running, verified, strict=True)})
        self._running = {each.key for each in running}
        if len(self._schedule) > MOST_SCHEDULED:
            self._settle(self.costs)
        if self.controller is not None:
            self._teach(self.controller, proposal, verified, seconds)

    def _teach(self, controller: Controller, proposal: Proposal, verified: Sequence[Verified], seconds: float) -> None:
        controller.note_round(seconds)
        for draft, each in zip(proposal.drafts, verified, strict=True):
            # A network's acceptance says nothing of a text's, which knows its own.
            if not draft.num_tokens or (self.has_network and draft.is_of_text):
                continue
            read = draft.read()
            if read.confidence is not None:
                controller.calibration.note(read.confidence[: read.num_tokens], len(each.path))
            else:
                controller.acceptance.observe(read.parents, each.path)
        if self.benefit.spent_s >= self._reported_at_s:
            self._report(controller)

    def _settle(self, costs: RoundCosts) -> None:
        """Count the rounds since the batch was last empty as the plain steps that their samples would have taken."""
        share = self._schedule.settle(lambda num_sequences: costs.pass_s(num_sequences, 0))
        if self.benefit.drafted_s > self._settled.drafted_s:  # without drafts the rounds were the schedule
            self.benefit = self.benefit.scaled_since(self._settled, share)
        self._settled = self.benefit

    def _report(self, controller: Controller) -> None:
        """Find anew where drafting pays: here, on the thread that changes what is known, as others read the answer."""
        self._reported_at_s = self.benefit.spent_s + REPORT_S
        self.pays_up_to = controller.pays_up_to(self._max_running, TYPICAL_CONTEXT)

    def note_step(self, batch: Batch, seconds: float) -> None:
        """Learn from a plain step of the batch that was run for its time alone."""
        if self.costs is not None:
            self.costs.observe_pass(batch.num_running, sum(len(each.token_ids) for each in batch.running), seconds)

    def finish(self, sequence: SampleState) -> None:
        """Note a finished sample's length, and show the sample to a drafter that learns, where its group goes on."""
        self.remaining.observe(sequence.num_generated)
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
        self._running.discard(sequence.key)
        if self.costs is not None and not self._running and len(self._schedule):
            self._settle(self.costs)
        if self.applies_to(sequence.group):
            self.drafter.forget(sequence.key)
            self._reading.forget(sequence)

    def forget_prompt(self, group: Group) -> None:
        if self.applies_to(group):
            self.drafter.forget(group.key)
            self._reading.forget_prompt(group)

    def _catch_up(self, batch: Batch) -> None:
        """Let the drafter read what waits for it, of the sequences that wait longest, before it takes too much room."""
        if self.controller is None or not self.drafter.needs.any:
            return
        behind = {
            row: self._reading.unread(each) for row, each in enumerate(batch.running) if self.applies_to(each.group)
        }
        if sum(behind.values()) * self.target.feature_bytes <= MOST_WAITING_BYTES:
            return
        longest = sorted(behind, key=lambda row: -behind[row])[: max(1, len(behind) // 4)]
        contexts = [self._context(batch, row, 0) for row in longest]
        with self._timed():
            self.drafter.catch_up(contexts)
        self._reading.caught_up(contexts)

    def _states(self, batch: Batch, limits: Sequence[int]) -> list[RowState]:
        """Return what the controller must know of each sequence; how long it will last only where that matters."""
        states = []
        for sequence, limit in zip(batch.running, limits, strict=True):
            backlog, remaining = self._reading.backlog(sequence), float(sequence.num_remaining)
            if backlog > self.shape.num_draft_tokens:
                remaining = self.remaining.expected(sequence.num_generated, sequence.num_remaining)
            states.append(RowState(len(sequence.token_ids), limit, backlog, remaining, sequence.key))
        return states

    def _context(
        self,
        batch: Batch,
        row: int,
        max_depth: int,
        network_depth: int | None = None,
        stop: StopRule | None = None,
    ) -> DraftContext:
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
            noise=sequence.uniforms.noise,
            network_depth=network_depth,
            stop=stop,
        )

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start, cost_start = self.clock(), self.cost_clock()
        yield
        self.timing.draft_s += self.clock() - start
        self._draft_cost_s += self.cost_clock() - cost_start


def _first(draft: AnyDraft, count: int) -> AnyDraft:
    """Return a draft's first nodes; one that may have ended before its depth is read, for its rows cost."""
    if count < draft.num_tokens:
        draft = draft.read()
    return draft if count >= draft.num_tokens else draft.read().first(count)


def _depth(draft: AnyDraft, planned: int) -> int:
    """Return the depth that a draft was made to: none where there was nothing to draft, or nothing worth its rows.

    A draft that says no more, or that a broken model ended, is taken to be as deep as ``planned``.
    """
    if isinstance(draft, UnreadDraft):
        return draft.num_tokens if draft.is_confident else planned
    if not draft.token_ids:
        return planned if draft.nonfinite else 0
    return 1 + int(tree_shape(draft.parents)[1].max())


def _check(draft: AnyDraft, context: DraftContext) -> None:
    assert draft.num_tokens <= context.max_draft_tokens, "a drafter proposed more than it was allowed"
    if isinstance(draft, Draft) and draft.token_ids:
        _, depths = tree_shape(draft.parents)
        assert depths.max() < context.max_depth, "a drafter proposed deeper than it was allowed"
