"""This module estimates pass@k and an interval of accuracy from the numbers of right samples of prompts. It is pure."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, sqrt
from statistics import NormalDist
from typing import NamedTuple

CONFIDENCE = 0.95


class Tally(NamedTuple):
    """Counts one prompt's scored samples and those among them that are right. E.g. ``Tally(num=8, num_right=3)``"""

    num: int
    num_right: int


class Proportion(NamedTuple):
    """Holds a proportion with the ends of its interval of confidence."""

    value: float
    low: float
    high: float


def pass_at(k: int, tallies: Sequence[Tally]) -> float | None:
    """Return the probability that one of k samples of a prompt is right, as the mean over prompts.

    The unbiased estimator of Chen et al. 2021 (arXiv:2107.03374, equation 1), ``1 - C(n - c, k) / C(n, k)``: the share
    of the choices of k out of n samples that hold a right sample. Prompts with fewer than k scored samples are left
    out; None where no prompt is left.
    """
    shares = [1 - comb(each.num - each.num_right, k) / comb(each.num, k) for each in tallies if each.num >= k]
    return sum(shares) / len(shares) if shares else None


def powers_of_two(largest: int) -> list[int]:
    """Return 1, 2, 4, ... up to ``largest``."""
    return [1 << exponent for exponent in range(largest.bit_length())]


def accuracy(tallies: Sequence[Tally], confidence: float = CONFIDENCE) -> Proportion | None:
    """Return the share of right samples, with Wilson's interval; None without a sample.

    Wilson's score interval (1927) keeps its coverage near 0 and 1, where two standard errors on either side of the
    estimate do not. It is for independent samples, and those of one prompt are alike. So it is taken at the number of
    independent samples that would say as much, the effective sample size that Franco, Little, Louis and Slud (2019)
    recommend for clustered samples: the variance of as many independent samples over the variance clustered by prompt
    (Miller 2024, arXiv:2411.00640). With one sample a prompt both are the same, and the interval is Wilson's own; where
    the samples of each prompt are all right or all wrong, it is Wilson's over the prompts.
    """
    counted = [each for each in tallies if each.num]
    num, num_right = sum(each.num for each in counted), sum(each.num_right for each in counted)
    if not num:
        return None
    value = num_right / num
    return Proportion(value, *_wilson(value, _effective_num(counted, value, num), confidence))


def clustered_variance(tallies: Sequence[Tally], value: float) -> float:
    """Return the variance of the proportion ``value`` where samples of one prompt may depend on each other."""
    num = sum(each.num for each in tallies)
    return sum((each.num_right - each.num * value) ** 2 for each in tallies) / num**2


def _effective_num(tallies: Sequence[Tally], value: float, num: int) -> float:
    """Return the effective sample size, at most that of the samples; of prompts, where nothing varies."""
    variance = clustered_variance(tallies, value)
    if variance == 0.0:
        return len(tallies) if value in (0.0, 1.0) else num
    return min(float(num), value * (1 - value) / variance)


def _wilson(value: float, num: float, confidence: float) -> tuple[float, float]:
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = value + z**2 / (2 * num)
    half = z * sqrt(value * (1 - value) / num + z**2 / (4 * num**2))
    scale = 1 + z**2 / num
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
