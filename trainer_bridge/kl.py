"""This module estimates the KL of the policy to the reference from its samples (joschu.net/blog/kl-approx.html)."""

from __future__ import annotations

import torch

LARGEST = 10.0  # of low_var_kl, slime's and verl's


def estimated_kl(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, kind: str) -> torch.Tensor:
    """Return each token's estimate of KL(policy || reference), with slime's names.

    k1 is the log ratio itself: unbiased, but as a loss its gradient is noise around 0. k2 is half its square. k3 is
    unbiased and never negative (GRPO's); low_var_kl is k3, at most 10.
    """
    log_ratio = logprobs - ref_logprobs
    match kind:
        case "k1":
            return log_ratio
        case "k2":
            return log_ratio.square() / 2.0
        case "k3" | "low_var_kl":
            if kind == "k3":
                return (-log_ratio).exp() + log_ratio - 1.0
            held = log_ratio.clamp(min=-2.0 * LARGEST)  # where the bound holds: exp of more may be infinite, no 0
            return ((-held).exp() + held - 1.0).clamp(max=LARGEST)
    raise AssertionError(f"the settings know no KL {kind}")
