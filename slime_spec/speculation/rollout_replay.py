"""The replay plays a rollout round by round: the believable way to what the rollout switch computes in sums.

All sequences start at once and each runs until it has its length. It is what a server does that admits everybody, on a
machine whose steps and rounds take what two functions of the batch say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slime_spec.speculation.rollout_switch import BatchUse


@dataclass(frozen=True)
class Replay:
    """Holds a replayed rollout: its running batches, its seconds, and the rounds of all sequences."""

    uses: tuple[BatchUse, ...]
    seconds: float
    num_rounds: int


def replay(
    lengths: Sequence[int], seconds_of: Callable[[int], float], tokens_of: Callable[[], int] = lambda: 1
) -> Replay:
    """Play a rollout of sequences with these lengths, the prefill's token apart.

    ``seconds_of(batch)`` is what a step or a round takes, ``tokens_of()`` what it brings a sequence: draws it.
    """
    left, num_rounds = [length for length in lengths if length > 0], 0
    seconds: dict[int, float] = {}
    tokens: dict[int, int] = {}
    while left:
        brought = [min(tokens_of(), length) for length in left]
        size, num_rounds = len(left), num_rounds + len(left)
        seconds[size] = seconds.get(size, 0.0) + seconds_of(size)
        tokens[size] = tokens.get(size, 0) + sum(brought)
        left = [length - count for length, count in zip(left, brought, strict=True) if length > count]
    uses = tuple(BatchUse(size, seconds[size], tokens[size]) for size in sorted(seconds, reverse=True))
    return Replay(uses, sum(seconds.values()), num_rounds)
