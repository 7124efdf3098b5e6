"""Engines and draft training share this choice of experts, and so do their routers' weights, in fp32.

Scores, choice and weights are those of transformers and SGLang: of Qwen3-MoE a softmax over all experts, of GLM-4.5 and
DeepSeek-V3 (arXiv 2412.19437, equations 12 to 16) a sigmoid per expert, whose choice a stored correction moves.
"""

from __future__ import annotations

import math

import torch

from slime_spec.checkpoints.block_parts import Experts

LEAST_SUM = 1e-20  # of a token's weights, before they are divided by it


def route(
    logits: torch.Tensor, kind: Experts, correction: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's experts and their weights, both [tokens, chosen], of fp32 ``logits`` [tokens, experts]."""
    scores = logits.softmax(dim=-1) if kind.score == "softmax" else logits.sigmoid()
    preference = scores if correction is None else scores + correction
    if kind.num_groups > 1:
        preference = _within_best_groups(preference, kind)
    chosen = preference.topk(kind.num_per_token, dim=-1).indices
    weights = scores.gather(-1, chosen)
    if kind.renormalises:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + LEAST_SUM)
    return chosen, weights * kind.scaling


def _within_best_groups(preference: torch.Tensor, kind: Experts) -> torch.Tensor:
    """Leave the groups whose best two experts together are preferred; the others' experts cannot be chosen."""
    grouped = preference.unflatten(-1, (kind.num_groups, -1))
    best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(kind.num_groups_per_token, dim=-1).indices
    is_open = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=grouped.device).scatter_(-1, best, True)
    return grouped.masked_fill(~is_open.unsqueeze(-1), -math.inf).flatten(-2)
