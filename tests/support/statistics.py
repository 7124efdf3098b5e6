"""Two-sample comparisons of generated tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

from scipy.stats import chi2_contingency


def p_value(left: Sequence[Hashable], right: Sequence[Hashable]) -> float:
    """Two-sample chi-square; outcomes too rare for five expected counts per arm are pooled."""
    counts = [Counter(left), Counter(right)]
    both = counts[0] + counts[1]
    common = [key for key, count in both.items() if count >= 10]
    table = [[arm[key] for key in common] for arm in counts]
    rare = [sum(arm.values()) - sum(row) for arm, row in zip(counts, table, strict=True)]
    if sum(rare) >= 10:
        table = [[*row, count] for row, count in zip(table, rare, strict=True)]
    return float(chi2_contingency(table).pvalue)


def comparisons(left: Sequence[tuple[int, ...]], right: Sequence[tuple[int, ...]]) -> dict[str, float]:
    """p-values of three views on responses of four tokens."""
    return {
        "first token (after the prefill)": p_value([t[0] for t in left], [t[0] for t in right]),
        "second token (the first of a round)": p_value([t[1] for t in left], [t[1] for t in right]),
        "joint of tokens 2 to 4": p_value([t[1:4] for t in left], [t[1:4] for t in right]),
    }
