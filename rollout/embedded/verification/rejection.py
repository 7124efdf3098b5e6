"""Rejection sampling judges sampled drafts token by token (Leviathan et al.; SGLang's rejection sampling).

Draft x_i ~ q_i is accepted when u_i q_i(x_i) < p_i(x_i), u_i uniform. At the first refusal the token comes from the
residual distribution, relu(p_i - q_i) normalised; when all stand, the bonus token comes from p after them. The output
has the target's distribution, and a draft stands with probability sum min(p, q).

A draft without q was chosen, not sampled: q is one-hot. Acceptance then has probability p(x) and the residual is p
without x, which is the target-only walk, so that is what judges it. Rows at temperature 0 take the greedy walk: their
p is one-hot, whatever q was.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rollout.embedded.verification.distributions import kept_mass, sampling_distribution
from rollout.embedded.verification.draw import inverse_cdf
from rollout.embedded.verification.verifier import Verified, VerifyRow
from rollout.embedded.verification.verify_pass import Emission, Pass, Rule, Scratch, with_logprobs
from rollout.embedded.verification.walk import target_only
from slime_spec.types import is_greedy


class SampledChain:
    """Holds p and q of one row whose draft was sampled. ``weights`` [1 + drafts, vocab] are unnormalised p."""

    def __init__(self, row: VerifyRow, weights: torch.Tensor, mass: torch.Tensor) -> None:
        draft = row.draft.read()
        assert draft.is_chain, "only chains are sampled: settings that draft trees are refused at the start"
        assert draft.q_draft is not None, "a draft without q is judged by the walk"
        self.row, self.weights, self.mass, self.q_draft = row, weights, mass, draft.q_draft
        chosen = torch.tensor(draft.token_ids, device=weights.device).unsqueeze(1)
        self.p_of_token = (weights[:-1].gather(1, chosen).squeeze(1) / mass[:-1]).tolist()
        self.q_of_token = self.q_draft.gather(1, chosen).squeeze(1).tolist()
        assert min(self.q_of_token) > 0.0, "q must be the distribution that the draft was sampled from"
        uniforms = row.uniforms.accept_of_round(row.num_generated)
        self.uniforms = [uniforms[row.num_generated + i] for i in range(len(self.p_of_token))]

    def residual(self, num_accepted: int, scale: float, out: torch.Tensor) -> None:
        """Write relu(scale p - q) after ``num_accepted`` drafts into ``out`` [vocab]; the bonus token's p after all."""
        if num_accepted == len(self.p_of_token):
            out.copy_(self.weights[num_accepted])
            return
        torch.mul(self.weights[num_accepted], scale / self.mass[num_accepted], out=out)
        out.sub_(self.q_draft[num_accepted]).clamp_(min=0.0)
        if not bool(out.any()):  # p equals q to the last bit, so a refusal was rounding: any token of p's will do
            out.copy_(self.weights[num_accepted])


# How many drafts stand, and the scale of p in the residual
Acceptance = Callable[[SampledChain], tuple[int, float]]


def token_by_token(chain: SampledChain) -> tuple[int, float]:
    for index, (p, q, uniform) in enumerate(zip(chain.p_of_token, chain.q_of_token, chain.uniforms, strict=True)):
        if not uniform * q < p:
            return index, 1.0
    return len(chain.uniforms), 1.0


def judge_sampled(verify_pass: Pass, scratch: Scratch, acceptance: Acceptance) -> list[Verified]:
    """Judge rows with sampled drafts: accept uniforms judge the drafts, the emit uniform draws the last token."""
    logits, rows, roots = verify_pass.logits, verify_pass.rows, verify_pass.roots
    weights = sampling_distribution(logits, verify_pass.params, scratch.take("distribution", len(logits), logits))
    mass = kept_mass(weights, verify_pass.params)
    last_distribution = scratch.take("residual", len(rows), logits)
    num_accepted, uniforms = [], []
    for index, (row, root) in enumerate(zip(rows, roots, strict=True)):
        nodes = slice(root, root + row.num_nodes)
        chain = SampledChain(row, weights[nodes], mass[nodes])
        stands, scale = acceptance(chain)
        chain.residual(stands, scale, last_distribution[index])
        num_accepted.append(stands)
        uniforms.append(row.uniforms.emit[row.num_generated + stands])
    last = inverse_cdf(last_distribution, torch.tensor(uniforms, dtype=torch.float64, device=logits.device)).tolist()
    emissions = [
        Emission([*row.draft.read().token_ids[:stands], token], tuple(range(stands)), root)
        for row, root, stands, token in zip(rows, roots, num_accepted, last, strict=True)
    ]
    return with_logprobs(emissions, weights, [node for emission in emissions for node in emission.nodes])


def judge_token_by_token(verify_pass: Pass, scratch: Scratch) -> list[Verified]:
    return judge_sampled(verify_pass, scratch, token_by_token)


def rejection_sampling(row: VerifyRow) -> Rule:
    return judge_token_by_token if was_sampled(row) else target_only(row)


def was_sampled(row: VerifyRow) -> bool:
    """Return whether the draft's distribution counts: a row that samples has drafts that were drawn from it."""
    return row.draft.is_sampled and not is_greedy(row.params.temperature)
