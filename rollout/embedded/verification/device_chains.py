"""On a device the sampled drafts of a pass are judged together, padded to the longest: [rows, drafts].

A rule says how many drafts of each chain stand and how p is scaled in the residual; rejection and block verification
differ in nothing else. ``rejection`` and ``block`` judge the same chains one by one, and say what the rules are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from rollout.embedded.transfer import Array
from rollout.embedded.unread import ENDED, UnreadDraft
from rollout.embedded.verification.draw import inverse_cdf
from rollout.embedded.verification.verifier import Verified
from rollout.embedded.verification.verify_pass import Emission, Pass


class ChainArrays:
    """Holds what judging the sampled drafts of some rows of a pass needs on the device.

    A row's drafts are followed by padding. Of drafts that are not read, tokens and lengths are known to the device.
    """

    def __init__(self, verify_pass: Pass, which: Sequence[int]) -> None:
        self.rows = [verify_pass.rows[index] for index in which]
        drafts = [row.draft for row in self.rows]
        assert all(draft.is_chain for draft in drafts), "only chains are sampled: settings with trees are refused"
        lengths = [draft.num_tokens for draft in drafts]
        longest = max(lengths, default=0)
        shape = len(self.rows), longest
        tokens, accept, emit = np.zeros(shape, np.int64), np.ones(shape), np.zeros((len(self.rows), longest + 1))
        first_q, num_q = np.zeros(len(self.rows), np.int64), 0
        for index, (row, draft, length) in enumerate(zip(self.rows, drafts, lengths, strict=True)):
            start = row.num_generated
            if isinstance(draft, UnreadDraft):
                first_q[index] = draft.row * draft.of.num_nodes
            else:
                tokens[index, :length] = draft.token_ids
                first_q[index], num_q = num_q, num_q + length
            accept[index, :length] = row.uniforms.accept_of_round(start)[start : start + length]
            emit[index, : length + 1] = row.uniforms.emit[start : start + length + 1]
        roots = np.array(verify_pass.roots, np.int64)[np.array(which, np.int64)]
        self.arrays = np.array(lengths, np.int64), roots, tokens, first_q, accept, emit

    def drafted(self, lengths: torch.Tensor, tokens: torch.Tensor, first_q: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the drafts' true lengths [rows], their tokens [rows, longest], and their q [.., vocab]."""
        unread = {draft.of for draft in (row.draft for row in self.rows) if isinstance(draft, UnreadDraft)}
        if not unread:
            q_drafts = [row.draft.read().q_draft for row in self.rows]
            return lengths, tokens, torch.cat([each for each in q_drafts if each is not None])
        (of,) = unread
        assert of.q_draft is not None, "sampled drafts have the distributions that they were drawn from"
        tokens = of.tokens.index_select(0, first_q // of.num_nodes)[:, : tokens.shape[1]]
        num_kept = (tokens != ENDED).long().cumprod(dim=1).sum(dim=1)
        return lengths.minimum(num_kept), tokens.clamp(min=0), of.q_draft

    def read(self, num_accepted: Array, last: Array, logprobs: Array, of_last: Array, least_q: Array) -> list[Verified]:
        assert least_q.min() > 0.0, "q must be the distribution that the draft was sampled from"
        verified = []
        for index, row in enumerate(self.rows):
            stands = int(num_accepted[index])
            emission = Emission([*row.draft.read().token_ids[:stands], int(last[index])], tuple(range(stands)), 0)
            verified.append(emission.verified(iter([*logprobs[index, :stands].tolist(), float(of_last[index])])))
        return verified


class SampledChains:
    """Holds p and q of chains on the device. ``weights`` [nodes of the pass, vocab] are unnormalised p."""

    def __init__(
        self, chains: ChainArrays, weights: torch.Tensor, mass: torch.Tensor, tensors: Sequence[torch.Tensor]
    ) -> None:
        most, self.roots, tokens, self._first_q, self.accept, self._emit = tensors
        self.lengths, self._tokens, self._q_draft = chains.drafted(most, tokens, self._first_q)
        self._weights, self._mass = weights, mass
        steps = torch.arange(self._tokens.shape[1], device=weights.device)
        self.is_draft = steps < self.lengths.unsqueeze(1)
        within = torch.where(self.is_draft, steps, 0)
        nodes = self.roots.unsqueeze(1) + within
        self._of_token = weights[nodes, self._tokens]
        self.p_of_token = (self._of_token / mass[nodes]).double()
        self.q_of_token = self._q_draft[self._first_q.unsqueeze(1) + within, self._tokens].double()

    def residual(self, after: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return relu(scale p - q) [rows, vocab] after that many drafts [rows]; ``scale`` is fp64 [rows].

        After a whole chain, which has no q there, it means nothing.
        """
        nodes = self.roots + after
        q_row = self._first_q + after.minimum(self.lengths - 1).clamp(min=0)
        p_scaled = self._weights.index_select(0, nodes) * (scale.to(self._mass.dtype) / self._mass[nodes]).unsqueeze(1)
        return p_scaled.sub_(self._q_draft.index_select(0, q_row)).clamp_(min=0.0)

    def judge(self, acceptance: Acceptance) -> tuple[torch.Tensor, ...]:
        """Return num_accepted, the last token, every draft's logprob, the last token's, and the least q of a draft."""
        num_accepted, scale = acceptance(self)
        residual = self.residual(num_accepted, scale)
        whole = self._weights.index_select(0, self.roots + num_accepted)
        # p equals q to the last bit, so a refusal was rounding: any token of p's will do
        takes_p = (num_accepted == self.lengths) | ~residual.any(dim=1)
        uniforms = self._emit.gather(1, num_accepted.unsqueeze(1)).squeeze(1)
        last = inverse_cdf(torch.where(takes_p.unsqueeze(1), whole, residual), uniforms)
        of_last = whole.gather(1, last.unsqueeze(1)).squeeze(1).log()
        return num_accepted, last, self._of_token.log(), of_last, self.q_of_token.where(self.is_draft, 1.0).min()


# How many drafts of each chain stand [rows], and the scale of p in the residual, fp64 [rows]
Acceptance = Callable[[SampledChains], tuple[torch.Tensor, torch.Tensor]]


def token_by_token(chains: SampledChains) -> tuple[torch.Tensor, torch.Tensor]:
    stands = (chains.accept * chains.q_of_token < chains.p_of_token) & chains.is_draft
    return stands.long().cumprod(dim=1).sum(dim=1), torch.ones_like(chains.p_of_token[:, 0])


def longest_prefix(chains: SampledChains) -> tuple[torch.Tensor, torch.Tensor]:
    ratios = [torch.ones_like(chains.p_of_token[:, 0])]
    passes: list[torch.Tensor] = []
    longest = chains.is_draft.shape[1]
    for length in range(1, longest + 1):
        p, q = chains.p_of_token[:, length - 1], chains.q_of_token[:, length - 1]
        ratio = (ratios[-1] * p / q).clamp(max=1.0)
        probability = ratio
        if length < longest:
            left = chains.residual(chains.lengths.clamp(max=length), ratio).sum(dim=-1).double()
            # Nothing left over and nothing lost: p equals q here, and the next prefix passes wherever this one does.
            inner = torch.where(left + 1.0 - ratio > 0.0, left / (left + 1.0 - ratio), 1.0)
            probability = torch.where(chains.lengths == length, ratio, inner)
        passes.append(chains.accept[:, length - 1] < probability)
        ratios.append(ratio)
    lengths = torch.arange(1, longest + 1, device=chains.lengths.device)
    num_accepted = (lengths * (torch.stack(passes, dim=1) & chains.is_draft)).amax(dim=1)
    return num_accepted, torch.stack(ratios, dim=1).gather(1, num_accepted.unsqueeze(1)).squeeze(1)
