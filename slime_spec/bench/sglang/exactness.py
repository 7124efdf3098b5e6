"""Compare the SGLang engine's greedy replies with and without speculation, and with the embedded engine's."""

from __future__ import annotations

from collections.abc import Sequence

from slime_spec.algorithms import NONE
from slime_spec.bench.rows import BenchOptions, Row, at_least
from slime_spec.bench.sglang.replies import Samples, replies
from slime_spec.bench.sglang.settings import place
from slime_spec.types import GeneratedSample

EXACT = "float32"  # with fewer bits, passes over several tokens may choose the other token of a near tie


def measure(options: BenchOptions) -> list[Row]:
    plain = replies(options, NONE.name)
    rows = []
    for algorithm in options.algorithms:
        found = replies(options, algorithm)
        if algorithm != NONE.name:
            rows.append(_row(options, algorithm, "plain", "SGLang without speculation", found.sglang, plain.sglang))
        rows.append(_row(options, algorithm, "embedded", "the embedded engine", found.sglang, plain.embedded))
    return rows


def _row(options: BenchOptions, algorithm: str, name: str, other: str, found: Samples, expected: Samples) -> Row:
    what = (
        f"{algorithm}, {options.dtype}, on {place(options)}: of {len(found)} replies of {options.num_new_tokens} "
        f"greedy tokens, those that equal {other}'s, token for token"
    )
    return exactly(options, f"exactness.{algorithm.lower()}.equals_{name}", what, share_of_equals(found, expected))


def exactly(options: BenchOptions, id: str, what: str, share: float) -> Row:
    """Return the row of a share that must be 1 in fp32."""
    return at_least(id, what, share, "share", 1.0) if options.dtype == EXACT else Row(id, what, share, "share")


def share_of_equals(found: Sequence[GeneratedSample], expected: Sequence[GeneratedSample]) -> float:
    return sum(one.token_ids == other.token_ids for one, other in zip(found, expected, strict=True)) / len(expected)
