"""The counting task asks for lists of numbers whose lengths have a long tail, and rewards how far they are right.

In a rollout of such replies a few go on long after most have ended, as in jobs whose replies are reasoned.
"""

from __future__ import annotations

import math
import random
import re

from slime_spec.interfaces import Problem
from slime_spec.types import Prompt

MEDIAN_COUNT, SIGMA = 15, 1.0  # the lognormal that counts are drawn from, before its ends are cut off
LEAST, MOST = 5, 90  # numbers of a list: the question shows three, and SmolLM2 takes at most 398 tokens for 90
LARGEST_FIRST = 50
DIGITS = re.compile("[0-9]+")  # \d would take the digits of every script


def count_problem(rng: random.Random) -> Problem:
    """Draw a list's length and first number. E.g. "Count from 7 to 17. ... 7, 8, 9, ..."."""
    first, count = rng.randint(1, LARGEST_FIRST), _count(rng)
    numbers = [str(number) for number in range(first, first + count)]
    opening = ", ".join(numbers[:3])
    form = f"Answer with just the numbers, separated by commas: {opening}, ..."
    asked = f"Count from {first} to {numbers[-1]}. {form}"
    return Problem(asked, ", ".join(numbers))


def share_counted(prompt: Prompt, reply: str) -> float:
    """Return the numbers that are right before the first mistake, over those asked for or those written, if more.

    A reply's numbers are its runs of ASCII digits, whatever stands between them; 1 is for the whole list and no other
    number. The reward is graded because whole lists are too rare at first: an untrained SmolLM2-135M writes 4 % of
    them, so that of most groups all rewards would be 0. Counting on costs as much as stopping early.
    """
    wanted, written = DIGITS.findall(prompt.answer), DIGITS.findall(reply)
    pairs = zip(wanted, written, strict=False)
    num_right = next((i for i, (right, given) in enumerate(pairs) if right != given), min(len(wanted), len(written)))
    return num_right / max(len(wanted), len(written))


def _count(rng: random.Random) -> int:
    """Draw again what falls outside the ends: cut off at them, one list in 25 would have the greatest length."""
    while True:
        count = round(rng.lognormvariate(math.log(MEDIAN_COUNT), SIGMA))
        if LEAST <= count <= MOST:
            return count
