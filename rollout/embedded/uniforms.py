"""A sample has one stream of uniforms per purpose, indexed by the generated token that the uniform decides.

What a sample draws depends on its seed and on its own past, whatever else runs in the batch and however many engines
there are; so a seed names one output. Streams are independent of each other: a draft must not be drawn with the uniform
that judges it.

Token t is emitted once, so one stream serves ``emit`` for the sample's life. It may be drafted in several rounds, and
block verification looks at the uniforms of a whole draft before it refuses its tail: what is known of a used uniform is
then part of the past. So ``draft_of_round`` and ``accept_of_round`` are new streams in every round.

Where tokens are drawn by races (``verification.race``), ``noise`` takes the place of ``emit``: it too is one for the
sample's life, and drafts may look at it, for they do not change which token it decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import overload

import numpy as np

_MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment: the golden ratio's bits
_DRAFT, _ACCEPT, _NOISE = 1, 2, 3


class Uniforms:
    """Gives the streams of one sample; a stream that is never asked for costs nothing."""

    def __init__(self, seed: int, count: int) -> None:
        self._seed, self._count = seed, count

    @cached_property
    def emit(self) -> Sequence[float]:
        """Return the uniforms of tokens in plain decoding and the target-only walk, and of residual and bonus draws."""
        # Not torch's generator, which reads 32 bits of a seed.
        uniforms: list[float] = np.random.Generator(np.random.PCG64(self._seed & _MASK)).random(self._count).tolist()
        return uniforms

    def draft_of_round(self, num_generated: int) -> Sequence[float]:
        """Return uniforms that draw the draft of token t in the round that starts after ``num_generated`` tokens."""
        return RoundUniforms(self._draft_key, num_generated, self._count)

    def accept_of_round(self, num_generated: int) -> Sequence[float]:
        """Return uniforms that judge token t's draft in that round, where drafts are judged by their own uniforms."""
        return RoundUniforms(self._accept_key, num_generated, self._count)

    @cached_property
    def noise(self) -> Noise:
        """Return the noise of races, which draw a token in plain decoding, in the walk, and in coupled drafts."""
        return Noise(mixed(mixed(self._seed) + _NOISE))

    @cached_property
    def _draft_key(self) -> int:
        return mixed(mixed(self._seed) + _DRAFT)

    @cached_property
    def _accept_key(self) -> int:
        return mixed(mixed(self._seed) + _ACCEPT)


class Noise:
    """Gives a key to every generated token; the key and a token id make the noise of that token id in the race."""

    def __init__(self, stream_key: int) -> None:
        self._stream_key = stream_key

    def key(self, t: int) -> int:
        """Return the 64 bits from which the noise of generated token ``t`` is counted on."""
        return mixed(self._stream_key + t * GOLDEN)


class RoundUniforms(Sequence[float]):
    """Makes uniforms in [0, 1) from a counter when they are asked for: most rounds use a few of thousands."""

    def __init__(self, stream_key: int, num_generated: int, count: int) -> None:
        self._stream_key, self._num_generated, self._count = stream_key, num_generated, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> float: ...

    @overload
    def __getitem__(self, index: slice) -> list[float]: ...

    def __getitem__(self, index: int | slice) -> float | list[float]:
        if isinstance(index, slice):
            return [self._uniform(t) for t in range(*index.indices(self._count))]
        return self._uniform(range(self._count)[index])

    def _uniform(self, t: int) -> float:
        return (mixed(self._key + t * GOLDEN) >> 11) * 2.0**-53

    @cached_property
    def _key(self) -> int:
        return mixed(self._stream_key + self._num_generated)


def mixed(value: int) -> int:
    """Return the splitmix64 of ``value``: 64 bits in which every bit of ``value`` counts."""
    value = (value + GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
