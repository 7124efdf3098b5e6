"""A ranking verifier adds other tokens' logprobs to what another verifier decided, for the rows that ask for them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from math import exp, isfinite, log

import torch

from rollout.embedded.logprobs import Beside, Wanted, of_ids, ranked
from rollout.embedded.verification.distributions import sampling_distribution
from rollout.embedded.verification.penalties import adjusted
from rollout.embedded.verification.verifier import Verified, Verifier, VerifyRow
from slime_spec.types import is_greedy


class RankingVerifier:
    """Decides as ``verifier`` does; ``Verified.beside`` is there for the rows that want something.

    Tokens are ranked by what a logprob is: log softmax(logits / T), after bias and penalties. ``eos_token_ids`` are the
    verifier's own.
    """

    def __init__(self, verifier: Verifier, eos_token_ids: frozenset[int]) -> None:
        self._verifier, self._eos_token_ids = verifier, eos_token_ids

    @property
    def lossy(self) -> bool:
        return self._verifier.lossy

    @property
    def takes_unread(self) -> bool:
        return self._verifier.takes_unread

    def __call__(self, logits: torch.Tensor, rows: Sequence[VerifyRow]) -> list[Verified]:
        verified = self._verifier(logits, rows)
        first = 0
        for index, row in enumerate(rows):
            if row.wanted:
                of_row = self._beside(logits[first : first + row.num_nodes], row, row.wanted, verified[index])
                verified[index] = verified[index]._replace(beside=of_row)
            first += row.num_nodes
        return verified

    @torch.inference_mode()
    def _beside(self, logits: torch.Tensor, row: VerifyRow, wanted: Wanted, verified: Verified) -> list[Beside]:
        nodes = torch.tensor([0, *(1 + node for node in verified.path)], device=logits.device)
        chosen = adjusted(logits, [row], self._eos_token_ids)[nodes]
        temperature = row.params.temperature
        logprobs = (chosen if is_greedy(temperature) else chosen / temperature).log_softmax(-1)
        kept = [((), 0.0)] * len(nodes) if not wanted.kept else _kept(chosen, row, verified)
        each = zip(ranked(logprobs, wanted.num_ranked), of_ids(logprobs, wanted.token_ids), kept, strict=True)
        return [Beside(likeliest, ids, *of_kept) for likeliest, ids, of_kept in each]


def _kept(logits: torch.Tensor, row: VerifyRow, verified: Verified) -> list[tuple[Sequence[int], float]]:
    """Return, for each token, the ids that the filters kept, the likeliest first, and its logprob among them.

    A token that they did not keep is among them too: a lossy verifier may emit it. Greedy decoding keeps one token.
    """
    if is_greedy(row.params.temperature):
        return [(array("i", [token_id]), 0.0) for token_id in verified.token_ids]
    kept: list[tuple[Sequence[int], float]] = []
    distribution = sampling_distribution(logits, [row.params] * len(logits)).cpu()
    for weights, token_id, logprob in zip(distribution, verified.token_ids, verified.logprobs, strict=True):
        if not isfinite(logprob):  # the core gives the request up
            kept.append(((), logprob))
            continue
        likely = weights.nonzero().squeeze(1)
        token_ids = array("i", likely[weights[likely].argsort(descending=True, stable=True)].tolist())
        mass = float(weights.sum(dtype=torch.float64))
        if not weights[token_id]:
            token_ids, mass = array("i", [*token_ids, token_id]), mass + exp(logprob)
        kept.append((token_ids, min(0.0, logprob - log(mass))))
    return kept
