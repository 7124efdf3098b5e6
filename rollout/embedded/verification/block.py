"""Block verification (arXiv 2403.10444) is rejection sampling that judges a sampled draft as one block.

With P_0 = 1 and P_i = min(P_{i-1} p_i(x_i) / q_i(x_i), 1), and S_i the sum of relu(P_i p_{i+1} - q_{i+1}) over the
vocabulary, prefix i of the draft passes when its own uniform is below

    h_i = S_i / (S_i + 1 - P_i)   for i < gamma,      h_gamma = P_gamma.

The longest prefix that passes stands, even where a shorter one did not, and the next token comes from relu(P_i p_{i+1}
- q_{i+1}) normalised, or from p after the whole draft. The output has the target's distribution, and no rule of this
kind accepts more tokens on average; token-wise rejection accepts at most as many.
"""

from __future__ import annotations

import torch

from rollout.embedded.verification.rejection import SampledChain, judge_sampled, was_sampled
from rollout.embedded.verification.verifier import Verified, VerifyRow
from rollout.embedded.verification.verify_pass import Pass, Rule, Scratch
from rollout.embedded.verification.walk import target_only


def longest_prefix(chain: SampledChain) -> tuple[int, float]:
    """Return the number of accepted drafts, and P of that prefix, the scale of p in the residual."""
    prefix_ratios = [1.0]
    for p, q in zip(chain.p_of_token, chain.q_of_token, strict=True):
        prefix_ratios.append(min(prefix_ratios[-1] * p / q, 1.0))
    gamma = len(chain.uniforms)
    scales = torch.tensor(prefix_ratios[1:gamma], dtype=chain.weights.dtype, device=chain.weights.device)
    p_scaled = chain.weights[1:gamma] * (scales / chain.mass[1:gamma]).unsqueeze(1)
    sums = p_scaled.sub_(chain.q_draft[1:gamma]).clamp_(min=0.0).sum(dim=-1).tolist()
    for length in range(gamma, 0, -1):
        ratio = prefix_ratios[length]
        passes = ratio if length == gamma else _pass_probability(sums[length - 1], ratio)
        if chain.uniforms[length - 1] < passes:
            return length, ratio
    return 0, 1.0


def _pass_probability(residual_sum: float, ratio: float) -> float:
    # Nothing left over and nothing lost: p equals q here, and the next prefix passes wherever this one does.
    return residual_sum / (residual_sum + 1.0 - ratio) if residual_sum + 1.0 - ratio > 0.0 else 1.0


def judge_block(verify_pass: Pass, scratch: Scratch) -> list[Verified]:
    return judge_sampled(verify_pass, scratch, longest_prefix)


def block_verification(row: VerifyRow) -> Rule:
    return judge_block if was_sampled(row) else target_only(row)
