"""On a device the rows of a pass are filtered together: top-k, top-p and min-p are vectors over the rows.

What is kept is what ``distributions`` keeps; a row without a filter of a kind has a cutoff of 0 there, which drops
nothing. The host does not know how many tokens a nucleus holds, so it sorts as many as there may be.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rollout.embedded.verification.distributions import is_filtered
from slime_spec.types import SamplingParams


class FilterArrays:
    """Holds what filtering the nodes of a pass needs on the device; ``params`` are of every node."""

    def __init__(self, params: Sequence[SamplingParams]) -> None:
        nodes = [node for node, each in enumerate(params) if is_filtered(each)]
        filters = [params[node] for node in nodes]
        self.any = bool(nodes)
        self._largest_k = max((each.top_k for each in filters), default=0)
        self._ranks_all = any(each.top_k <= 0 and each.top_p < 1.0 for each in filters)
        self.arrays = (
            np.array(nodes, np.int64),
            np.array([each.top_k for each in filters], np.int64),
            np.array([(each.top_p, each.min_p) for each in filters], np.float64).reshape(-1, 2),
        )

    def width(self, vocab: int) -> int:
        """Return how many of the likeliest tokens of each row must be ranked; 0 where only min-p filters."""
        return vocab if self._ranks_all else min(self._largest_k, vocab)


def filter_weights(weights: torch.Tensor, filters: FilterArrays, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Drop from ``weights`` [nodes, vocab], in place, what the nodes' filters drop; return each node's mass [nodes].

    ``tensors`` are the filters' arrays on the device. The mass is exactly 1 without filters.
    """
    mass = weights.new_ones(weights.shape[0])
    if not filters.any:
        return mass
    nodes, top_k, top_p_min_p = tensors
    top_p, min_p = top_p_min_p.unbind(1)
    kept, width = weights.index_select(0, nodes), filters.width(weights.shape[1])
    if width > 0:
        ranked = kept.topk(width, dim=-1).values
        has_k = ((top_k > 0) & (top_k < weights.shape[1])).unsqueeze(1)
        num_ranked = torch.where(has_k, top_k.unsqueeze(1), width)
        kept = _dropped_below(kept, ranked.gather(1, num_ranked - 1).masked_fill(~has_k, 0.0))
        top_p = top_p.unsqueeze(1)
        goal = (top_p.to(kept.dtype) * kept.sum(-1, keepdim=True)).double()
        kept = _dropped_below(kept, _nucleus_cutoff(ranked, num_ranked, goal).masked_fill(top_p >= 1.0, 0.0))
    kept = _dropped_below(kept, min_p.unsqueeze(1).to(kept.dtype) * kept.amax(-1, keepdim=True))
    weights.index_copy_(0, nodes, kept)
    return mass.index_copy_(0, nodes, kept.sum(-1))


def _nucleus_cutoff(ranked: torch.Tensor, num_ranked: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """Return the weight with which the likeliest ``num_ranked`` tokens reach ``goal``, each [nodes, 1]."""
    mass = ranked.double()
    within = torch.arange(ranked.shape[1], device=ranked.device) < num_ranked
    inside = ((mass.cumsum(-1) - mass) < goal) & within
    return ranked.gather(1, inside.sum(-1, keepdim=True).clamp_(min=1) - 1)


def _dropped_below(weights: torch.Tensor, cutoff: torch.Tensor) -> torch.Tensor:
    return torch.where(weights < cutoff, 0.0, weights)
