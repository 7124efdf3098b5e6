"""Recent drafts say what the next round's will bring: how many of their nodes are likely, and how likely.

a round    candidates, one per sequence ──► note
planning   pool(depth)                  all their nodes, likeliest first, as if each had drafted so deep

Those of the sequences that still run count, where there are some: the ones whose drafts were accepted end first, so
that drafts of all who ran lately promise too much to who is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

KEPT_DRAFTS = 48
MOST_OF_A_ROUND = 8
ENOUGH_OWN = 4  # drafts of sequences that still run, to say what theirs bring
PROBE_COPIES = 4  # a draft that was made to learn stands for others that were not made


Numbers = npt.NDArray[np.float64]


class Candidate(NamedTuple):
    """Says of one sequence's draft how likely each node is accepted, which is what the node brings on average.

    Of a draft that must not be cut ``num_fixed`` nodes are verified; more than those are known where a network stopped.
    ``of_text`` are drafts that cost nothing, beside a network's.
    Example: ``Candidate((0.9, 0.45))`` brings 1.35 tokens.
    """

    chances: tuple[float, ...] = ()
    of_text: bool = False
    num_fixed: int | None = None

    @property
    def num_nodes(self) -> int:
        return len(self.chances) if self.num_fixed is None else self.num_fixed


NO_CANDIDATE = Candidate()


@dataclass(frozen=True)
class Pool:
    """Holds the nodes of ``num_drafts`` drafts, as sums of the likeliest ones: ``tokens[n]`` is what n nodes bring.

    ``asked`` is the share of drafts that a network makes; ``reached[i]`` the share of those that are still worth going
    on with after step i.
    """

    num_drafts: int
    tokens: Numbers
    asked: float = 1.0
    reached: Numbers | None = None

    @property
    def nodes_per_draft(self) -> float:
        return (len(self.tokens) - 1) / self.num_drafts

    def brought(self, num_nodes: Numbers, num_sequences: int) -> Numbers:
        """Return what each of these numbers of nodes brings, the likeliest of so many sequences' drafts."""
        share = self.num_drafts / num_sequences
        return np.interp(num_nodes * share, self._numbers, self.tokens) / share

    @cached_property
    def _numbers(self) -> Numbers:
        return np.arange(len(self.tokens), dtype=float)

    def steps(self, num_sequences: int, depth: int) -> float:
        """Return the mean number of steps of a network that stops once no sequence is worth going on with."""
        if self.reached is None:
            return depth
        return 1.0 + float((1.0 - (1.0 - self.reached[: depth - 1]) ** num_sequences).sum())


def pool_of(num_drafts: int, chances: Numbers, asked: float = 1.0, reached: Numbers | None = None) -> Pool:
    """Return the pool of nodes with these chances, in any order."""
    return Pool(num_drafts, np.concatenate(((0.0,), np.sort(chances)[::-1].cumsum())), asked, reached)


class RecentDrafts:
    """Keeps candidates of recent rounds: of those in which a network drafted, and what texts alone gave."""

    def __init__(self, max_nodes: int) -> None:
        self._network = _Ring(max_nodes)
        self._texts = _Ring(max_nodes)

    @property
    def knows_network(self) -> bool:
        return self._network.count > 0

    @property
    def knows_texts(self) -> bool:
        return self._texts.count > 0

    def note(self, candidates: Sequence[Candidate], keys: Sequence[int], is_probe: bool = False) -> None:
        """Keep what some of a round's drafts promised, before any was cut; ``keys`` are the sequences'."""
        every = list(zip(keys, candidates, strict=True))
        made = [(key, each) for key, each in every if each.chances]
        if any(not each.of_text for _, each in made):
            self._network.add(_some(made) * (PROBE_COPIES if is_probe else 1))
        if not is_probe and (self.knows_texts or any(each.of_text for _, each in made)):
            self._texts.add([(key, each if each.of_text else NO_CANDIDATE) for key, each in _some(every)])

    def pools(
        self, depths: Sequence[int], rates: Sequence[float], worth: float, keys: Sequence[int]
    ) -> dict[int, Pool]:
        """Return, by depth, the nodes of a round in which a network drafts so deep for the sequences ``keys``.

        A draft that was less deep goes on at ``rates`` given the parent. It stops where its chance is below ``worth``.
        """
        chances, is_text = self._network.of(keys)
        texts, network = chances[is_text], chances[~is_text].copy()
        of_texts = texts[~np.isnan(texts)]
        for node in range(1, len(rates)):
            missing = np.isnan(network[:, node])
            network[missing, node] = network[missing, node - 1] * rates[node]
        reached = (network >= worth).mean(axis=0) if len(network) else np.zeros(len(rates))
        count, asked = len(chances), len(network) / len(chances)
        return {
            depth: pool_of(count, np.concatenate((of_texts, network[:, :depth].ravel())), asked, reached)
            for depth in depths
        }

    def text_pool(self, keys: Sequence[int]) -> Pool:
        """Return the nodes of a round in which texts alone give drafts to the sequences ``keys``."""
        chances, _ = self._texts.of(keys)
        return pool_of(len(chances), chances[~np.isnan(chances)], 0.0)


class _Ring:
    """Holds the last KEPT_DRAFTS candidates."""

    def __init__(self, max_nodes: int) -> None:
        self._chances = np.full((KEPT_DRAFTS, max_nodes), np.nan)
        self._is_text = np.zeros(KEPT_DRAFTS, bool)
        self._keys = np.zeros(KEPT_DRAFTS, int)
        self._next = 0

    @property
    def count(self) -> int:
        return min(self._next, KEPT_DRAFTS)

    def of(self, keys: Sequence[int]) -> tuple[Numbers, npt.NDArray[np.bool_]]:
        """Return the chances [drafts, nodes], NaN beyond a draft's end, and which drafts are of texts.

        They are those of the sequences ``keys``, or where these have too few, all.
        """
        chosen = np.isin(self._keys[: self.count], keys)
        if chosen.sum() < ENOUGH_OWN:
            chosen[:] = True
        return self._chances[: self.count][chosen], self._is_text[: self.count][chosen]

    def add(self, candidates: Iterable[tuple[int, Candidate]]) -> None:
        for key, each in candidates:
            place, self._next = self._next % KEPT_DRAFTS, self._next + 1
            self._chances[place] = np.nan
            self._chances[place, : len(each.chances)] = each.chances
            self._is_text[place], self._keys[place] = each.of_text, key


def _some(candidates: Sequence[tuple[int, Candidate]]) -> list[tuple[int, Candidate]]:
    """Return a few of a round's candidates, from all over the batch."""
    return list(candidates[:: -(-len(candidates) // MOST_OF_A_ROUND)])
