"""The temperature of sampled drafts is chosen by how much of the target's distribution each choice covered lately.

A draft network stays as flat as the policy that it learned from, while that policy sharpens in training. Drafts that
are sampled from q^(1/tau), renormalised, follow it: tau = 1 is the draft's own distribution at the request's
temperature, and towards tau = 0 drafts become the likeliest tokens. The overlap s = sum min(p_target, q_draft) is what
rejection sampling accepts of a first draft; races with shared noise agree at least with probability s / (2 - s), and
at tau = 0 with probability s.

No choice bends the output: verification by p / q is told the distribution that a draft was really drawn from, and this
policy looks at earlier rounds alone; after a race the target's own token decides, whatever was drafted.

This is a pure policy: the engine reports the overlaps of one sequence every few rounds, and asks for the temperature.
"""

from __future__ import annotations

from collections.abc import Sequence

from slime_spec.config.tree import SpeculativeConfig
from slime_spec.sglang.draft_shape import DraftShape

OWN = 1.0  # the draft's own distribution
TEMPERATURES = (OWN, 0.8, 0.6, 0.4, 0.2)
# Rounds or drafts between two observations, whichever comes first: what one costs is below 1 % of either.
MOST_ROUNDS, MOST_DRAFTS = 4, 8
WINDOW = 32  # observations that count; overlaps follow a policy that changes within a run
FIRST_CHOICE = 8  # observations before anything else than the draft's own distribution is drawn from
MARGIN = 0.01  # of overlap, by which another temperature must be better


class DraftTemperature:
    """Chooses among ``temperatures`` the one whose overlap was largest lately; of one there is nothing to choose.

    Each observation weighs ``1 - 1 / WINDOW`` times as much as the next one. The first of the temperatures is drawn
    from until another is better by MARGIN, and so on: what was chosen stays where the difference is noise.
    """

    def __init__(self, temperatures: Sequence[float] = TEMPERATURES) -> None:
        self.temperatures = tuple(temperatures)
        self._sums = [0.0] * len(self.temperatures)
        self._weight = 0.0
        self.num_observed = 0
        self._num_rounds, self._num_drafts = MOST_ROUNDS, 0  # since the last one that was wanted
        self._chosen = 0

    @property
    def value(self) -> float:
        return self.temperatures[self._chosen]

    def is_due(self, num_drafts: int) -> bool:
        """Count a round that draws so many drafts, and return whether the overlaps of one of them are wanted."""
        self._num_rounds += 1
        self._num_drafts += num_drafts
        if len(self.temperatures) == 1 or (self._num_rounds < MOST_ROUNDS and self._num_drafts < MOST_DRAFTS):
            return False
        self._num_rounds, self._num_drafts = 0, 0
        return True

    def observe(self, overlaps: Sequence[float]) -> None:
        """Take the overlaps of one draft's first token, one number in [0, 1] for each temperature."""
        keep = 1.0 - 1.0 / WINDOW
        self._sums = [keep * total + overlap for total, overlap in zip(self._sums, overlaps, strict=True)]
        self._weight = keep * self._weight + 1.0
        self.num_observed += 1
        best = max(range(len(self._sums)), key=self._sums.__getitem__)
        gain = (self._sums[best] - self._sums[self._chosen]) / self._weight
        if self.num_observed >= FIRST_CHOICE and gain > MARGIN:
            self._chosen = best


def draft_temperatures(config: SpeculativeConfig, shape: DraftShape) -> tuple[float, ...]:
    """Return the temperatures that an embedded engine chooses from; none where drafts are not sampled.

    Without a setting, the engine chooses where that changes no token of a seed: where drafts are races with the
    target's noise, and where an automatic depth has taken the promise away already.
    """
    if not (config.draws_chains and config.record.can_sample and shape.topk == 1):
        return ()
    if config.draft_temperature is not None:
        return (config.draft_temperature,)
    return TEMPERATURES if config.use_gumbel_coupling or config.is_automatic else (OWN,)
