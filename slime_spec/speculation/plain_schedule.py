"""A plain schedule says how full the batch would have been without drafts, while the same samples were generated.

Time is counted in plain steps: a round over B sequences that brings T tokens counts T / B, a plain step counts 1.
A sample that started at step s and got n tokens is in the batch from s to s + n in plain decoding:

    with drafts    a a a a               without    a a a a a a      samples that get ahead of the others leave early,
                   b b b b b                        b b b b b b      and those that lag behind go on alone
                   c c c c c c c c                  c c c c c c

To take each round's tokens for plain steps in its own batch would count the lonely rounds of c as a gain, but in plain
decoding c has company to its end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import pairwise


class PlainSchedule:
    """Remembers the rounds since it was last settled; keys are those of sequences."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._steps = 0.0
        self._of_rounds: dict[int, float] = defaultdict(float)  # plain steps, by the batch of the rounds
        self._stays: dict[int, tuple[float, int]] = {}  # the step at which a sequence came, and its tokens

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self._stays)

    def round(self, num_tokens: Mapping[int, int]) -> None:
        """Count a round that brought each sequence so many tokens."""
        for key, count in num_tokens.items():
            start, before = self._stays.get(key, (self._steps, 0))
            self._stays[key] = start, before + count
        steps = sum(num_tokens.values()) / len(num_tokens)
        self._of_rounds[len(num_tokens)] += steps
        self._steps += steps

    def settle(self, step_s: Callable[[int], float]) -> float:
        """Return the schedule's seconds over those of the rounds' tokens in the rounds' own batches, and begin anew.

        ``step_s(B)`` are the seconds of a plain step over B sequences. It is 1 where no round had drafts.
        """
        of_rounds_s = sum(steps * step_s(count) for count, steps in self._of_rounds.items())
        changes: dict[float, int] = defaultdict(int)
        for start, count in self._stays.values():
            changes[start] += 1
            changes[start + count] -= 1
        scheduled_s, num_sequences = 0.0, 0
        for at, until in pairwise(sorted(changes)):
            num_sequences += changes[at]
            if num_sequences:
                scheduled_s += (until - at) * step_s(num_sequences)
        self._clear()
        return scheduled_s / of_rounds_s if of_rounds_s else 1.0
