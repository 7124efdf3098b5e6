"""This module finds the known name that a mistyped name means; a name that only looks alike is not suggested.

A hyphen, an underscore or a dot ends a word. A known name is near where each of its words is the same word or a word
with few wrong letters (``--rolout-batch-size``) or another ending (``accept``, ``acceptance``), where the names differ
by hyphens alone (``--numrollout``), or where it alone has further words in front (``--max-response-len``).
``--eval-interval`` is not near to ``--save-interval``, and ``--rollout-top-n`` as near to ``--rollout-top-k`` as to
``--rollout-top-p``: neither is suggested.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

SEPARATORS = re.compile(r"[-_./]+")
SHORTEST_STEM = 4


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that ``name`` most likely means, letter case and separators aside; None where none does."""
    words = _words(name)
    if not any(words):
        return None
    candidates = {candidate: _words(candidate) for candidate in known}
    distances = {candidate: _distance(words, theirs) for candidate, theirs in candidates.items()}
    near = {candidate: distance for candidate, distance in distances.items() if distance is not None}
    if near:
        nearest = [candidate for candidate, distance in near.items() if distance == min(near.values())]
        return nearest[0] if len(nearest) == 1 or near[nearest[0]] == 0 else None
    longer = [candidate for candidate, theirs in candidates.items() if len(words) > 1 and _ends(theirs, words)]
    return longer[0] if len(longer) == 1 else None


def did_you_mean(name: str, known: Iterable[str], written: Callable[[str], str] = str) -> str:
    """Return ``"Did you mean trainer.lr? "``, or nothing when no known name is near: put it before the remedy.

    ``written`` says how the name stands in the sentence: ``repr`` quotes it.
    """
    near = closest(name, known)
    return f"Did you mean {written(near)}? " if near else ""


def _words(name: str) -> list[str]:
    return [word for word in SEPARATORS.split(name.lower()) if word]


def _ends(words: list[str], end: list[str]) -> bool:
    return len(words) > len(end) and words[-len(end) :] == end


def _distance(ours: list[str], theirs: list[str]) -> int | None:
    """Return how many letters of the names differ; None where they are different names."""
    if "".join(ours) == "".join(theirs):
        return 0
    if len(ours) != len(theirs):
        return None
    total = 0
    for our, their in zip(ours, theirs, strict=True):
        if our != their:
            edits = 1 if _share_a_stem(our, their) else num_edits(our, their)
            if edits > max(1, (max(len(our), len(their)) + 1) // 3):
                return None
            total += edits
    return total


def _share_a_stem(our: str, their: str) -> bool:
    short, long = sorted((our, their), key=len)
    return len(short) >= SHORTEST_STEM and long.startswith(short)


def num_edits(ours: str, theirs: str) -> int:
    """Return the fewest letters to change, add, leave out or swap with the next that make ``theirs`` of ``ours``."""
    before: list[int] = []
    row = list(range(len(theirs) + 1))
    for i, our in enumerate(ours, start=1):
        before, last, row = row, before, [i]
        for j, their in enumerate(theirs, start=1):
            best = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (our != their))
            if i > 1 and j > 1 and our == theirs[j - 2] and ours[i - 2] == their:
                best = min(best, last[j - 2] + 1)
            row.append(best)
    return row[-1]
