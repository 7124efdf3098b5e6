"""A ranking verifier adds the likeliest tokens to what another verifier decided, for the rows that ask for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rollout.embedded.logprobs import Ranked, ranked
from rollout.embedded.verification.penalties import adjusted
from rollout.embedded.verification.verifier import Verified, Verifier, VerifyRow
from slime_spec.types import is_greedy


class RankingVerifier:
    """Decides as ``verifier`` does; ``Verified.ranked`` is there for the rows that ask for it.

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
            if row.num_ranked:
                of_row = self._ranked(logits[first : first + row.num_nodes], row, verified[index].path)
                verified[index] = verified[index]._replace(ranked=of_row)
            first += row.num_nodes
        return verified

    @torch.inference_mode()
    def _ranked(self, logits: torch.Tensor, row: VerifyRow, path: tuple[int, ...]) -> list[Ranked]:
        nodes = torch.tensor([0, *(1 + node for node in path)], device=logits.device)
        chosen = adjusted(logits, [row], self._eos_token_ids)[nodes]
        temperature = row.params.temperature
        return ranked((chosen if is_greedy(temperature) else chosen / temperature).log_softmax(-1), row.num_ranked)
