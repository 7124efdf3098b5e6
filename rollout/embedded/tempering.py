"""Tempering gives sampled drafts their temperature, and shows the policy that chooses it what each would have covered.

propose    contexts get the temperature; every few rounds one of them asks for its first token's distribution
verify     that token's overlap with the target's distribution, by temperature ──► DraftTemperature.observe
next round the temperature may be another one: it depends on earlier rounds alone
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import isfinite

import torch

from rollout.embedded.drafting import DraftContext
from rollout.embedded.verification.distributions import sampling_distribution
from rollout.embedded.verification.verifier import VerifyRow
from slime_spec.speculation.draft_temperature import DraftTemperature
from slime_spec.types import is_greedy

LEAST = 1e-4  # tokens below this share of the likeliest one are left out of overlaps


class Tempering:
    """Owns the temperature of an engine's sampled drafts; one thread calls it."""

    def __init__(self, policy: DraftTemperature) -> None:
        self._policy = policy
        self._asked = 0
        self._kept: tuple[int, torch.Tensor, float] | None = None  # row of the batch, q_draft [vocab], its temperature

    @property
    def temperature(self) -> float:
        return self._policy.value

    def tempered(self, contexts: Sequence[DraftContext], rows: Sequence[int]) -> list[DraftContext]:
        """Return the contexts of a round, of these rows of the batch, with the temperature to draw from.

        One of those that sample may ask for a distribution, each in its turn.
        """
        self._kept = None
        found = [context._replace(draft_temperature=self.temperature) for context in contexts]
        sampling = [index for index, context in enumerate(found) if not is_greedy(context.params.temperature)]
        if sampling and self._policy.is_due(len(sampling)):
            self._asked += 1
            index = sampling[self._asked % len(sampling)]
            found[index] = found[index]._replace(on_first_distribution=partial(self._keep, rows[index]))
        return found

    def _keep(self, row: int, q_draft: torch.Tensor) -> None:
        self._kept = row, q_draft, self.temperature

    def weigh(self, logits: torch.Tensor, rows: Sequence[VerifyRow]) -> None:
        """Learn from a round's logits [nodes of all rows, vocab], where a distribution was asked for and given."""
        if self._kept is None:
            return
        row, q_draft, temperature = self._kept
        self._kept = None
        root = sum(each.num_nodes for each in rows[:row])
        p_target = sampling_distribution(logits[root : root + 1], [rows[row].params])[0]
        found = overlaps(p_target, q_draft, temperature, self._policy.temperatures)
        if all(map(isfinite, found)):
            self._policy.observe(found)


def overlaps(
    p_target: torch.Tensor, q_draft: torch.Tensor, drawn_at: float, temperatures: Sequence[float]
) -> list[float]:
    """Return sum min(p_target, q_draft) with the draft's distribution at each of ``temperatures``; NaN where none is.

    ``q_draft`` [vocab] is its distribution at ``drawn_at``, ``p_target`` [vocab] is of any sum. Both are compared over
    the tokens that either holds likely: what is below LEAST of the likeliest changes an overlap by less than their sum.
    """
    q_shares, p_shares = q_draft / q_draft.max(), p_target / p_target.max()
    likely = ((p_shares > LEAST) | (q_shares > LEAST ** (1.0 / drawn_at))).nonzero().squeeze(1)
    p_likely, log_q = p_shares[likely].double(), q_shares[likely].double().log() * drawn_at
    tempered = torch.stack([log_q / temperature for temperature in temperatures]).softmax(dim=-1)
    shared: list[float] = torch.minimum(p_likely / p_likely.sum(), tempered).sum(dim=-1).tolist()
    return shared
