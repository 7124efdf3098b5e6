"""The rollout switch decides whether an engine whose rounds are not ours drafts in its next rollout.

    gain = seconds of the rollout's tokens without drafts / with drafts, summed over its running batches
    seconds with drafts = seconds without * break_even(batch) / accept_length

The running batches are those of the last rollout: how long how many sequences ran at once. Break-even lengths come from
pairs that are measured in turns between rollouts; the accept length from whatever drafted last. Off is preferred: to
begin, drafts must promise FOR_OFF times the speed beyond the doubt, and they end where they promise less than none.
Without an estimate nothing changes.

This is a pure policy: the engine tells what ran, measures the batch that it is asked to measure, and asks what is next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import sqrt
from typing import NamedTuple

from slime_spec.speculation.break_even import BreakEven, Estimate
from slime_spec.speculation.net_benefit import NetBenefit

FOR_OFF = 1.03  # drafts must promise this much more than none before they begin
KNOWN_SHARE = 0.9  # of a rollout's time must be at batches whose break-even length is known
WINDOW = 2048.0  # rounds that count for the accept length; it follows a policy that changes within a run
PROBE_GAIN = 1.10  # drafts that are all accepted must promise this much, or an engine that is off measures nothing
PROBE_SHARE = 0.008  # of the rollouts' time that measuring known batches again may take
CALIBRATED_SHARE = 0.1  # of a rollout's time at a batch make it worth a first measurement


class BatchUse(NamedTuple):
    """Says that ``num_running`` sequences ran at once for ``seconds``, in which they got ``num_tokens`` tokens.

    Example, a plain step of 8 sequences every 20 ms for a second: ``BatchUse(8, 1.0, 400)``
    """

    num_running: int
    seconds: float
    num_tokens: int


def grid_size(num_running: int) -> int:
    """Return the largest of the batches 1, 2, 3, 4, 6, 8, 12, ... that is no larger: those are what is measured."""
    power = 1 << (num_running.bit_length() - 1)
    return power + power // 2 if 2 * num_running >= 3 * power else power


class AcceptLength:
    """Keeps the tokens that a round brings, of drafts with at most ``num_steps`` tokens on a path."""

    def __init__(self, num_steps: int) -> None:
        self.most = num_steps + 1
        self._tokens = self._rounds = 0.0

    def observe(self, num_tokens: int, num_rounds: int) -> None:
        if num_rounds <= 0:
            return
        keep = WINDOW / (WINDOW + num_rounds)
        self._tokens, self._rounds = keep * self._tokens + num_tokens, keep * self._rounds + num_rounds

    @property
    def estimate(self) -> Estimate | None:
        """Return the mean and its error: numbers between 1 and ``most`` scatter no more than these two themselves."""
        if not self._rounds:
            return None
        mean = self._tokens / self._rounds
        variance = max(0.0, (self.most - mean) * (mean - 1.0))
        return Estimate(mean, sqrt(variance / self._rounds) / mean)


class RolloutSwitch:
    """Decides whether the next rollout drafts; ``speculates`` says what the requests that begin now should do."""

    def __init__(self, num_steps: int) -> None:
        self.speculates = True
        self.break_even = BreakEven()
        self.accept_length = AcceptLength(num_steps)
        self._earned_s = 0.0
        self._cost_s: dict[int, float] = {}

    def decide(self, uses: Sequence[BatchUse], drafted: bool) -> Estimate | None:
        """Set ``speculates`` for the next rollout and return the gain of drafting in one like the last.

        ``uses`` are the last rollout's, ``drafted`` whether it drafted. None: not enough is known, nothing changes.
        """
        gain = self.gain(uses, drafted)
        if gain is not None:
            is_sure = gain.value > FOR_OFF and gain.value * (1.0 - gain.relative_error) > 1.0
            self.speculates = gain.value >= 1.0 if self.speculates else is_sure
        return gain

    def gain(self, uses: Iterable[BatchUse], drafted: bool) -> Estimate | None:
        """Return the time of a rollout without drafts over its time with drafts; None where that is not known."""
        length = self.accept_length.estimate
        return None if length is None else self._gain(uses, drafted, length)

    def _gain(self, uses: Iterable[BatchUse], drafted: bool, length: Estimate) -> Estimate | None:
        """Return the gain for an accept length, which need not be the one that ``uses`` drafted with."""
        own = self.accept_length.estimate
        plain_s = spent_s = error_s = known_s = all_s = 0.0
        for use in uses:
            all_s += use.seconds
            ratio = self.break_even.at(use.num_running)
            if ratio is None or own is None:
                continue
            without_s = use.seconds * own.value / ratio.value if drafted else use.seconds
            with_s = without_s * ratio.value / length.value
            known_s += use.seconds
            plain_s, spent_s = plain_s + without_s, spent_s + with_s
            error_s += with_s * (ratio.relative_error + length.relative_error)
        if not spent_s or known_s < KNOWN_SHARE * all_s:
            return None
        return Estimate(plain_s / spent_s, error_s / spent_s)

    def benefit(self, uses: Iterable[BatchUse], drafted: bool) -> NetBenefit:
        """Return what a rollout took and what it would have taken without drafts; batches not known are left out.

        A rollout that did not draft counts the same on both sides, where it is known what drafts would have done.
        """
        total, length = NetBenefit(), self.accept_length.estimate
        for use in uses:
            ratio = self.break_even.at(use.num_running)
            if ratio is None or length is None:
                continue
            if not drafted:
                total = total.with_plain(use.seconds)
                continue
            plain_s = use.seconds * length.value / ratio.value
            error_s = plain_s * (ratio.relative_error + length.relative_error)
            total = total.plus(NetBenefit(use.seconds, plain_s, error_s, use.seconds, use.seconds / ratio.value))
        return total

    @property
    def pays_up_to(self) -> int | None:
        """Return the largest measured batch at which drafts pay, 0 if they pay at none; None: nothing is measured."""
        length = self.accept_length.estimate
        if length is None or not self.break_even.batches:
            return None
        ratios = {size: self.break_even.at(size) for size in self.break_even.batches}
        paying = (size for size, ratio in ratios.items() if ratio and length.value > FOR_OFF * ratio.value)
        return max(paying, default=0)

    def batch_to_measure(self, uses: Sequence[BatchUse], drafted: bool) -> int | None:
        """Return the batch that is worth a measurement before the next rollout, of the grid; None if none is.

        A batch that matters and was never measured is measured at once. Others take their turns, by their share of the
        time and how often they were measured, as far as PROBE_SHARE of the rollouts' time has paid for them.
        """
        shares: dict[int, float] = {}
        total_s = sum(use.seconds for use in uses)
        for use in uses:
            size = grid_size(use.num_running)
            shares[size] = shares.get(size, 0.0) + use.seconds
        self._earned_s += PROBE_SHARE * total_s
        if not total_s:
            return None
        unknown = [size for size in shares if not self.break_even.num_pairs(size)]
        matter = [size for size in unknown if shares[size] >= CALIBRATED_SHARE * total_s]
        if matter:
            return max(matter, key=lambda size: shares[size])
        known = [size for size in shares if size not in unknown]
        if not known or not (self.speculates or self._could_pay(uses, drafted)):
            return None
        chosen = max(known, key=lambda size: shares[size] / (1.0 + self.break_even.num_pairs(size)))
        return chosen if self._cost_s.get(chosen, 0.0) <= self._earned_s else None

    def note_measurement(self, num_running: int, seconds: float) -> None:
        """Note what a measurement took; the first at a batch is part of the start and owes nothing."""
        if num_running in self._cost_s:
            self._earned_s -= seconds
        self._cost_s[num_running] = seconds

    def _could_pay(self, uses: Sequence[BatchUse], drafted: bool) -> bool:
        perfect = self._gain(uses, drafted, Estimate(float(self.accept_length.most), 0.0))
        return perfect is None or perfect.value > PROBE_GAIN
