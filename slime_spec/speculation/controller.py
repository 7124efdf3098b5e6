"""The controller decides, before each round, which sequences draft and how deep, so that tokens come fastest.

A round over B sequences of which some draft brings B tokens and what is accepted, and costs what RoundCosts says.
Tokens per second is the measure: a draft pays as long as its chance of being accepted buys more than its share. Off
is preferred where the difference is within the noise, and so is what was done in the round before. While off, one
sequence drafts now and then, where a gain is possible at all, so that acceptance stays known; all probes together take
less than PROBE_SHARE of the time.

This is a pure policy: the engine tells what ran and what it took, and asks for the next round's depths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from slime_spec.speculation.acceptance import RunningAcceptance
from slime_spec.speculation.round_costs import RoundCosts

DEPTHS = (1, 2, 3, 5, 7)
FOR_OFF = 1.03  # a round with drafts must promise this much more than a plain step
FOR_STAYING = 1.02
PROBE_GAIN = 1.10  # drafts that are all accepted must promise this much, or nothing is probed
PROBE_SHARE = 0.008
PROBE_DEPTH = 3
REUSED_ROUNDS = 8  # a plan for as many sequences as before is good for so many rounds
MOST_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class RowState(NamedTuple):
    """Says of one running sequence what its round depends on.

    ``context`` are the tokens it attends to; ``max_depth`` the drafts that its budget allows, 0 where it may not draft;
    ``backlog`` the tokens that its drafter must read first; ``remaining`` the tokens it will probably still generate.
    Example: ``RowState(context=80, max_depth=7, backlog=2, remaining=25.0)``
    """

    context: int
    max_depth: int
    backlog: int = 0
    remaining: float = 1e9


@dataclass(frozen=True)
class RoundPlan:
    """Holds the depth of every sequence's draft, 0 for a plain step; ``is_probe`` where only acceptance is learned.

    ``texts_may_pay`` says, where nobody drafts, that drafts which cost nothing could still be worth their rows.
    """

    depths: tuple[int, ...]
    is_probe: bool = False
    texts_may_pay: bool = False

    @property
    def drafts(self) -> bool:
        return any(self.depths)

    @property
    def steps(self) -> int:
        """Return the number of the drafter's steps."""
        return max(self.depths, default=0)


@dataclass(frozen=True)
class Option:
    """Holds a plan that was weighed: tokens and seconds of its round."""

    depth: int
    num_drafting: int
    tokens: float
    seconds: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class Controller:
    """Plans rounds of drafts with at most ``max_nodes`` nodes on paths of at most ``max_depth``; see the file's top.

    A network's drafts cost time, so ``plan`` says who drafts and how deep. Drafts that are found in a text cost next to
    nothing (``drafts_are_free``): whoever may draft does where a gain is possible at all, and ``kept_nodes`` says how
    many nodes of each draft are worth their rows.
    """

    def __init__(
        self, costs: RoundCosts, max_depth: int, max_nodes: int | None = None, drafts_are_free: bool = False
    ) -> None:
        self.costs = costs
        self.acceptance = RunningAcceptance(max_nodes or max_depth)
        self._depths = [depth for depth in DEPTHS if depth < max_depth] + [max_depth]
        self._drafts_are_free = drafts_are_free
        self._last_depth = 0
        self._plain_s = 0.0  # since the last probe
        self._chosen = Option(0, 0, 0.0, 1.0)
        self._num_rows, self._rounds_left = 0, 0
        self._texts_may_pay = False

    def plan(self, rows: Sequence[RowState]) -> RoundPlan:
        """Return the depths of the next round for sequences in this order."""
        self._num_rows, self._rounds_left = len(rows), REUSED_ROUNDS
        self._chosen, self._texts_may_pay = Option(0, 0, 0.0, 1.0), False
        order = sorted(range(len(rows)), key=lambda row: (rows[row].backlog, -rows[row].remaining))
        order = [row for row in order if rows[row].max_depth]
        if not order:
            return RoundPlan((0,) * len(rows))
        off = self._off(rows)
        if self._drafts_are_free:
            if self._could_pay(rows, order, off, FOR_OFF, are_free=True):
                self._chosen = Option(self._depths[-1], len(rows), 0.0, 1.0)
            return RoundPlan(tuple(min(self._chosen.depth, row.max_depth) for row in rows))
        gains = self.acceptance.chain(self._depths[-1])
        best = max(self._options(rows, order, gains), key=self._weighed)
        if self._weighed(best) > off.rate * (FOR_OFF if not self._last_depth else 1.0):
            self._last_depth, self._chosen = best.depth, best
            return _planned(rows, order[: best.num_drafting], best.depth)
        self._last_depth = 0
        if self._probes(rows, order, off):
            self._plain_s, self._rounds_left = 0.0, 0
            return _planned(rows, order[:1], min(PROBE_DEPTH, self._depths[-1]), is_probe=True)
        self._texts_may_pay = self._could_pay(rows, order, off, FOR_OFF, are_free=True)
        return RoundPlan((0,) * len(rows), texts_may_pay=self._texts_may_pay)

    def again(self, limits: Sequence[int]) -> RoundPlan | None:
        """Return the last plan for as many sequences, whose depths ``limits`` allow; None where it is time for another.

        Sequences change by a token or so a round: weighing all of them anew each time would cost more than it brings.
        """
        self._rounds_left -= 1
        everyone = self._chosen.num_drafting in (0, self._num_rows)
        if self._rounds_left < 0 or len(limits) != self._num_rows or not everyone:
            return None
        return RoundPlan(tuple(min(self._chosen.depth, limit) for limit in limits), False, self._texts_may_pay)

    def kept_nodes(self, rows: Sequence[RowState], chances: Sequence[Sequence[float]]) -> tuple[list[int], bool]:
        """Return how many of each draft's first nodes to verify, and whether that is a probe.

        ``chances[row]`` are the probabilities that the nodes of a row's draft are accepted. The rows of the pass go to
        the likeliest nodes of all drafts, as many as bring most tokens per second.
        """
        off = self._off(rows)
        nodes: list[tuple[float, int]] = []
        for row, of_row in enumerate(chances):
            nodes += ((chance, row) for chance in accumulate(of_row, min))  # a prefix is kept, whatever its order
        nodes.sort(key=lambda node: -node[0])
        tokens = [0.0, *accumulate(chance for chance, _ in nodes)]
        attended = [0, *accumulate(rows[row].context for _, row in nodes)]
        best, most = 0, off.rate * FOR_OFF
        for count in (*(count for count in MOST_COUNTS if count < len(nodes)), len(nodes)):
            seconds = self.costs.pass_s(len(rows) + count, sum(row.context for row in rows) + attended[count])
            if count and (len(rows) + tokens[count]) / seconds > most:
                best, most = count, (len(rows) + tokens[count]) / seconds
        kept = [0] * len(rows)
        for _, row in nodes[:best]:
            kept[row] += 1
        longest = max(range(len(rows)), key=lambda row: len(chances[row]))
        if not best and chances[longest] and self._probes(rows, [longest], off):
            self._plain_s = 0.0
            kept[longest] = min(PROBE_DEPTH, len(chances[longest]))
            return kept, True
        return kept, False

    def speedup(self, rows: Sequence[RowState]) -> float:
        """Return tokens per second of the best round over those of a plain step, by what is known now; 1 at least."""
        gains = self.acceptance.chain(self._depths[-1])
        order = [row for row in range(len(rows)) if rows[row].max_depth]
        rates = [option.rate for option in self._options(rows, order, gains)]
        return max([1.0, *(rate / self._off(rows).rate for rate in rates)])

    def pays_up_to(self, most: int, context: int) -> int:
        """Return the largest batch, up to ``most``, at which some draft beats a plain step; 0 if none does."""
        sizes = [size for size in MOST_COUNTS if size < most] + [most]
        state = RowState(context, self._depths[-1])
        paying = (size for size in reversed(sizes) if self.speedup([state] * size) > FOR_OFF)
        return next(paying, 0)

    def note_plain(self, seconds: float) -> None:
        """Count the time of a round that did not draft."""
        self._plain_s += seconds

    def _weighed(self, option: Option) -> float:
        return option.rate * (FOR_STAYING if option.depth == self._last_depth else 1.0)

    def _off(self, rows: Sequence[RowState]) -> Option:
        attended = sum(row.context for row in rows)
        return Option(0, 0, len(rows), self.costs.pass_s(len(rows), attended))

    def _options(
        self, rows: Sequence[RowState], order: Sequence[int], gains: Sequence[float], are_free: bool | None = None
    ) -> Iterator[Option]:
        """Yield every depth for the first sequences of ``order``, a few numbers of them.

        What a sequence has to catch up is shared by the rounds that it has left.
        """
        are_free = self._drafts_are_free if are_free is None else are_free
        num_rows, context = len(rows), sum(row.context for row in rows)
        counts = [count for count in MOST_COUNTS if count < len(order)] + [len(order)] if order else []
        for depth in self._depths:
            gained = [0.0, *accumulate(gains[:depth])]
            per_round = 1.0 + gained[depth]
            depths = [min(depth, rows[row].max_depth) for row in order]
            tokens = [0.0, *accumulate(gained[each] for each in depths)]
            drafted = [0, *accumulate(depths)]
            attended = [0, *accumulate(rows[row].context * each for row, each in zip(order, depths, strict=True))]
            behind = [0.0, *accumulate(_debt(rows[row], depth, per_round) for row in order)]
            for count in counts:
                seconds = self.costs.pass_s(num_rows + drafted[count], context + attended[count])
                if not are_free:
                    seconds += self.costs.draft_s(count, depth, round(count * per_round + behind[count]))
                yield Option(depth, count, num_rows + tokens[count], seconds)

    def _probes(self, rows: Sequence[RowState], order: Sequence[int], off: Option) -> bool:
        """Return whether it is time to learn, and perfect drafts would pay."""
        depth = min(PROBE_DEPTH, self._depths[-1])
        row = rows[order[0]]
        one = self.costs.pass_s(len(rows) + depth, sum(each.context for each in rows) + depth * row.context)
        cost_s = one - off.seconds + self.costs.draft_s(1, depth, row.backlog)
        return self._plain_s * PROBE_SHARE > cost_s and self._could_pay(rows, order, off, PROBE_GAIN)

    def _could_pay(
        self, rows: Sequence[RowState], order: Sequence[int], off: Option, gain: float, are_free: bool | None = None
    ) -> bool:
        """Return whether drafts that are all accepted would bring ``gain`` times as many tokens per second."""
        perfect = [1.0] * self._depths[-1]
        return any(option.rate > gain * off.rate for option in self._options(rows, order, perfect, are_free))


def _debt(row: RowState, depth: int, per_round: float) -> float:
    """Return the tokens that a sequence is behind, beyond what every round leaves, per round that it has left."""
    rounds_left = max(1.0, row.remaining / per_round)
    return max(0.0, row.backlog - per_round) / rounds_left


def _planned(rows: Sequence[RowState], drafting: Sequence[int], depth: int, is_probe: bool = False) -> RoundPlan:
    depths = [0] * len(rows)
    for row in drafting:
        depths[row] = min(depth, rows[row].max_depth)
    return RoundPlan(tuple(depths), is_probe)
