"""The controller decides, before each round, which sequences draft and how deep, so that tokens come fastest.

A round over B sequences of which some draft brings B tokens and what is accepted, and costs what RoundCosts says.
Tokens per second is the measure: a draft pays as long as its chance of being accepted buys more than its share. Off
is preferred where the difference is within the noise, and so is what was done in the round before. While off, one
sequence drafts now and then, where a gain is possible at all, so that acceptance stays known; all probes together take
less than PROBE_SHARE of the time, which until FIRST_DRAFTS were seen they take in advance: a controller that begins
knows nothing, and one probe a second would teach it too late.

    plan     before drafts are made: which sequences a network drafts for, and how deep, by what recent drafts promised
    keep     once they are made: which of their nodes are worth a row of the pass, by what each draft says of itself

Where drafts cannot be cut, as sampled ones whose tokens must not decide whether they are judged, all nodes are kept.

This is a pure policy: the engine tells what ran and what it took, and asks for the next round's depths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from slime_spec.speculation.acceptance import RunningAcceptance
from slime_spec.speculation.confidence import ConfidenceCalibration, StopRule, given_parent
from slime_spec.speculation.options import NOTHING, Option, Passes, counts_up_to, halves
from slime_spec.speculation.recent_drafts import Candidate, Pool, RecentDrafts, pool_of
from slime_spec.speculation.round_costs import RoundCosts

DEPTHS = (1, 2, 3, 5, 7)
FOR_OFF = 1.03  # a round with drafts must promise this much more than a plain step
FOR_STAYING = 1.02
PROBE_GAIN = 1.10  # drafts that are all accepted must promise this much, or nothing is probed
PROBE_SHARE = 0.008
FIRST_DRAFTS = 12
PROBE_DEPTH = 3
MOST_LEARNED = 8  # drafts of a round
TEXTS_AGAIN = 4  # plans
REUSED_ROUNDS = 8  # a plan for about as many sequences as before is good for so many rounds
ALIKE = 0.1  # share of the sequences that may have come or gone


class RowState(NamedTuple):
    """Says of one running sequence what its round depends on.

    ``context`` are the tokens it attends to; ``max_depth`` the drafts that its budget allows, 0 where it may not draft;
    ``backlog`` the tokens that its drafter must read first; ``remaining`` the tokens it will probably still generate;
    ``key`` tells it from others.
    Example: ``RowState(context=80, max_depth=7, backlog=2, remaining=25.0)``
    """

    context: int
    max_depth: int
    backlog: int = 0
    remaining: float = 1e9
    key: int = 0


class RoundPlan(NamedTuple):
    """Holds the depth of every sequence's draft, 0 for a plain step; ``is_probe`` where only acceptance is learned.

    ``texts_may_pay`` says, where nobody drafts, that drafts which cost nothing could still be worth their rows.
    ``stop`` says where a network's chain ends before its depth; None where that is not asked for.
    """

    depths: tuple[int, ...]
    is_probe: bool = False
    texts_may_pay: bool = False
    stop: StopRule | None = None

    @property
    def drafts(self) -> bool:
        return any(self.depths)

    @property
    def steps(self) -> int:
        """Return the number of the drafter's steps."""
        return max(self.depths, default=0)


class Controller:
    """Plans rounds of drafts with at most ``max_nodes`` nodes on paths of at most ``max_depth``; see the file's top.

    A network's drafts cost time, so ``plan`` says who drafts and how deep; ``cuts_network`` says that its drafts tell
    their confidence and may be cut. Drafts that are found in a text cost next to nothing (``drafts_are_free``): whoever
    may draft does where a gain is possible at all.
    """

    def __init__(
        self,
        costs: RoundCosts,
        max_depth: int,
        max_nodes: int | None = None,
        drafts_are_free: bool = False,
        cuts_network: bool = False,
    ) -> None:
        self.costs = costs
        self.acceptance = RunningAcceptance(max_nodes or max_depth)
        self.calibration = ConfidenceCalibration()
        self.recent = RecentDrafts(max_nodes or max_depth)
        self._depths = [depth for depth in DEPTHS if depth < max_depth] + [max_depth]
        self._drafts_are_free, self._cuts_network = drafts_are_free, cuts_network
        self._last_depth = 0
        self._probe_s_left = 0.0  # below zero what was taken in advance
        self._num_cut_probes = 0
        self._num_silent = 0  # plans since texts paid
        self._plan, self._num_rows, self._rounds_left = RoundPlan(()), 0, 0
        self._worth = 0.0  # of a node's chance, to draft on and verify it

    def plan(self, rows: Sequence[RowState]) -> RoundPlan:
        """Return the depths of the next round for sequences in this order."""
        self._plan = self._planned(rows)
        self._num_rows, self._rounds_left = len(rows), 0 if self._plan.is_probe else REUSED_ROUNDS
        return self._plan

    def _planned(self, rows: Sequence[RowState]) -> RoundPlan:
        order = sorted(range(len(rows)), key=lambda row: (rows[row].backlog, -rows[row].remaining))
        order = [row for row in order if rows[row].max_depth]
        if not order:
            return RoundPlan((0,) * len(rows))
        off = self._off(rows)
        if self._drafts_are_free:
            return _round(rows, order if self._free_could_pay(rows, order) else [], self._depths[-1])
        if not self._free_could_pay(rows, order):
            self._last_depth = 0
            return RoundPlan((0,) * len(rows))
        of_texts = self._of_texts(rows)
        least = max(off.rate, of_texts) * (1.0 if self._last_depth else FOR_OFF)
        best = self._best_option(rows, order, least)
        if self._weighed(best) > least:
            self._last_depth = best.depth
            self._worth = self._worth_of_node(rows, best)
            return self._stopped(_round(rows, order[: best.num_drafting], best.depth), self._worth)
        self._last_depth = 0
        if self._may_probe(rows, order, self._probe_s(rows, rows[order[0]])):
            plan = _round(rows, order[:1], min(PROBE_DEPTH, self._depths[-1]))
            return self._stopped(plan, 0.0)._replace(is_probe=True)
        return RoundPlan((0,) * len(rows), texts_may_pay=self._texts_may_pay(of_texts > FOR_OFF * off.rate))

    def _best_option(self, rows: Sequence[RowState], order: Sequence[int], least: float) -> Option:
        """Return the option of the highest rate, or any where none is above ``least``.

        Nodes that may be cut tell what none exceeds: those of the deepest drafts of all, made for the price of a step.
        """
        longest = self._depths[-1]
        if self._cuts_network:
            pool = self._pools(rows, self._depths[-1:])[longest]
            num_nodes, draft_s = pool.nodes_per_draft * len(order), self.costs.draft_s(1, 1) if pool.asked else 0.0
            bound = self._passes(rows).best(longest, len(order), num_nodes, pool, draft_s)
            if bound.rate * FOR_STAYING <= least:
                return NOTHING
        return max(self._options(rows, order, self._pools(rows, self._depths)), key=self._weighed)

    def _texts_may_pay(self, did_pay: bool) -> bool:
        """Return whether to look texts up: always where those of late pay, else now and then."""
        self._num_silent = 0 if did_pay or not self.recent.knows_texts else self._num_silent + 1
        return self._num_silent % TEXTS_AGAIN == 0

    def _stopped(self, plan: RoundPlan, below: float) -> RoundPlan:
        return plan._replace(stop=StopRule(below, self.calibration)) if self._cuts_network else plan

    def again(self, limits: Sequence[int]) -> RoundPlan | None:
        """Return the last plan for about as many sequences, as ``limits`` allow; None where it is time for another.

        Sequences change by a token or so a round: weighing all of them anew each time would cost more than it brings.
        """
        self._rounds_left -= 1
        depth, num_drafting = self._plan.steps, sum(map(bool, self._plan.depths))
        everyone = num_drafting in (0, self._num_rows)
        is_alike = abs(len(limits) - self._num_rows) <= ALIKE * self._num_rows
        if self._rounds_left < 0 or not is_alike or not everyone:
            return None
        return self._plan._replace(depths=tuple(min(depth, limit) for limit in limits))

    def keep(self, rows: Sequence[RowState], candidates: Sequence[Candidate], is_probe: bool = False) -> list[int]:
        """Return how many of each draft's first nodes to verify.

        The rows of the pass go to the likeliest nodes of all drafts, as many as bring most tokens per second. A probe's
        are all kept, and now and then those of one draft that would be cut.
        """
        whole = [each.num_nodes for each in candidates]
        drawn = [each for each in candidates if each.chances and not each.of_text]
        if self._cuts_network:
            self.recent.note(candidates, _keys(rows), is_probe)
            for each in drawn[:MOST_LEARNED]:
                self.acceptance.expect(given_parent(each.chances))
        if is_probe:
            return whole
        kept = self._best_cut(rows, candidates, 1.0 if self._cuts_network and drawn else FOR_OFF)
        cut = [row for row, count in enumerate(kept) if count < min(PROBE_DEPTH, whole[row])]
        if cut:
            row = cut[self._num_cut_probes % len(cut)]
            depth, before = min(PROBE_DEPTH, whole[row]), len(rows) + sum(kept)
            probed_s = self.costs.pass_s(before + depth - kept[row], 0) - self.costs.pass_s(before, 0)
            if self._may_probe(rows, cut, probed_s):
                kept[row], self._num_cut_probes = depth, self._num_cut_probes + 1
        return kept

    def _best_cut(self, rows: Sequence[RowState], candidates: Sequence[Candidate], for_none: float) -> list[int]:
        """Return how many nodes of each draft bring most tokens per second; none must be beaten ``for_none`` times."""
        nodes: list[tuple[float, int]] = []
        kept = [0] * len(rows)
        fixed_tokens = 0.0
        for row, each in enumerate(candidates):
            if each.num_fixed is not None:
                kept[row], fixed_tokens = each.num_fixed, fixed_tokens + sum(each.chances[: each.num_fixed])
            else:  # a prefix is kept, whatever its order
                nodes += ((chance, row) for chance in accumulate(each.chances, min))
        nodes.sort(key=lambda node: -node[0])
        num_rows = len(rows) + sum(kept)
        context = sum(row.context * (1 + count) for row, count in zip(rows, kept, strict=True))
        tokens = list(accumulate((chance for chance, _ in nodes), initial=len(rows) + fixed_tokens))
        attended = list(accumulate((rows[row].context for _, row in nodes), initial=context))
        best, most = 0, for_none * tokens[0] / self.costs.pass_s(num_rows, context)
        for count in counts_up_to(len(nodes)):
            rate = tokens[count] / self.costs.pass_s(num_rows + count, attended[count])
            if rate > most:
                best, most = count, rate
        for _, row in nodes[:best]:
            kept[row] += 1
        return kept

    def speedup(self, rows: Sequence[RowState]) -> float:
        """Return tokens per second of the best round over those of a plain step, by what is known now; 1 at least."""
        order = [row for row in range(len(rows)) if rows[row].max_depth]
        options = self._options(rows, order, self._pools(rows, self._depths), counts=(len(order),)) if order else ()
        return max([1.0, *(option.rate / self._off(rows).rate for option in options)])

    def pays_up_to(self, most: int, context: int) -> int:
        """Return the largest batch, up to ``most``, at which some draft beats a plain step; 0 if none does."""
        state = RowState(context, self._depths[-1])
        paying = (size for size in reversed(counts_up_to(most)) if self.speedup([state] * size) > FOR_OFF)
        return next(paying, 0)

    def note_round(self, seconds: float) -> None:
        """Count the time of a round, of which probes may take their share."""
        self._probe_s_left += seconds * PROBE_SHARE

    def _weighed(self, option: Option) -> float:
        return option.rate * (FOR_STAYING if option.depth == self._last_depth else 1.0)

    def _off(self, rows: Sequence[RowState]) -> Option:
        attended = sum(row.context for row in rows)
        return Option(0, 0, 0, len(rows), self.costs.pass_s(len(rows), attended))

    def _pools(self, rows: Sequence[RowState], depths: Sequence[int]) -> Mapping[int, Pool]:
        """Return what drafts of these depths will bring, by those of late, or else by the running acceptance."""
        longest = self._depths[-1]
        if self._cuts_network and self.recent.knows_network:
            return self.recent.pools(depths, self.acceptance.rates(longest), self._worth, _keys(rows))
        return self._uniform(self.acceptance.chain(longest))

    def _uniform(self, chain: Sequence[float]) -> Mapping[int, Pool]:
        return {depth: pool_of(1, np.array(chain[:depth])) for depth in self._depths}

    def _passes(self, rows: Sequence[RowState]) -> Passes:
        return Passes(self.costs, len(rows), sum(row.context for row in rows))

    def _of_texts(self, rows: Sequence[RowState]) -> float:
        """Return the tokens per second of a round without a network, in which texts give drafts."""
        if not self.recent.knows_texts:
            return 0.0
        pool = self.recent.text_pool(_keys(rows))
        return self._passes(rows).best(0, len(rows), len(rows) * pool.nodes_per_draft, pool, 0.0).rate

    def _options(
        self,
        rows: Sequence[RowState],
        order: Sequence[int],
        pools: Mapping[int, Pool],
        counts: Sequence[int] = (),
    ) -> Iterator[Option]:
        """Yield every depth for the first ``counts`` sequences of ``order``, or a few numbers, each with its best cut.

        What a sequence has to catch up is shared by the rounds that it has left.
        """
        passes = self._passes(rows)
        for depth, pool in pools.items():
            per_round = 1.0 + float(pool.tokens[-1]) / pool.num_drafts
            drafted = [0.0, *accumulate(min(pool.nodes_per_draft, rows[row].max_depth) for row in order)]
            behind = [0.0, *accumulate(_debt(rows[row], per_round) for row in order)]
            for count in counts or halves(len(order)):
                draft_s = 0.0
                if not self._drafts_are_free and pool.asked:
                    num_asked = max(1, round(count * pool.asked))
                    steps = pool.steps(num_asked, depth)
                    draft_s = self.costs.draft_s(num_asked, steps, round(num_asked * per_round + behind[count]))
                weighed = passes.best if self._cuts_network else passes.whole
                yield weighed(depth, count, drafted[count], pool, draft_s)

    def _worth_of_node(self, rows: Sequence[RowState], best: Option) -> float:
        """Return the chance from which a further node brings more tokens per second than it costs.

        Nodes of all sequences share a step. What is likelier than the least that ``best`` keeps has its row anyway.
        """
        drafting, verified = best.num_drafting, len(rows) + best.num_kept
        step_s = self.costs.draft_s(drafting, best.depth + 1) - self.costs.draft_s(drafting, best.depth)
        row_s = self.costs.pass_s(verified + 1, 0) - self.costs.pass_s(verified, 0)
        return best.rate * step_s / drafting + min(best.rate * row_s, best.least_chance)

    def _probe_s(self, rows: Sequence[RowState], row: RowState) -> float:
        """Return what it costs more than a plain step to let this sequence draft."""
        depth = min(PROBE_DEPTH, self._depths[-1])
        context = sum(each.context for each in rows)
        pass_s = self.costs.pass_s(len(rows) + depth, context + depth * row.context)
        return pass_s - self.costs.pass_s(len(rows), context) + self.costs.draft_s(1, depth, row.backlog)

    def _may_probe(self, rows: Sequence[RowState], order: Sequence[int], cost_s: float) -> bool:
        """Return whether it is time to learn at this cost, and perfect drafts would pay; the cost is then taken."""
        is_due = self._probe_s_left > cost_s or self.acceptance.num_observed < FIRST_DRAFTS
        if not is_due or not self._probe_could_pay(rows, order):
            return False
        # What was left over is given up: probes that could not pay for long must not come all at once.
        self._probe_s_left = min(self._probe_s_left, cost_s) - cost_s
        return True

    def _probe_could_pay(self, rows: Sequence[RowState], order: Sequence[int]) -> bool:
        """Return whether drafts that are all accepted would bring PROBE_GAIN times as many tokens per second."""
        perfect = self._uniform([1.0] * self._depths[-1])
        least = PROBE_GAIN * self._off(rows).rate
        return any(option.rate > least for option in self._options(rows, order, perfect))

    def _free_could_pay(self, rows: Sequence[RowState], order: Sequence[int]) -> bool:
        """Return whether any number of drafted tokens that cost nothing, all accepted, would pay."""
        passes, least = self._passes(rows), FOR_OFF * self._off(rows).rate
        most = sum(min(self._depths[-1], rows[row].max_depth) for row in order)
        return any(len(rows) + count > least * passes.pass_s(count) for count in counts_up_to(most))


def _keys(rows: Sequence[RowState]) -> list[int]:
    return [row.key for row in rows]


def _debt(row: RowState, per_round: float) -> float:
    """Return the tokens that a sequence is behind, beyond what every round leaves, per round that it has left."""
    rounds_left = max(1.0, row.remaining / per_round)
    return max(0.0, row.backlog - per_round) / rounds_left


def _round(rows: Sequence[RowState], drafting: Sequence[int], depth: int) -> RoundPlan:
    depths = [0] * len(rows)
    for row in drafting:
        depths[row] = min(depth, rows[row].max_depth)
    return RoundPlan(tuple(depths))
