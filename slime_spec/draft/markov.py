"""The Markov heads of DSpark (arXiv 2607.05147) turn the token before, and what came of those before it, into a bias.

    vanilla   w2(e)                        e = w1(token before)
    gated     w2(sigmoid(gate) · e)        gate = W_g [h; e] + b,            h the block's state at the position
    rnn       w2(tanh(output))             [gate; candidate; output] = W [s; e; h] + b,   s = 0 at a block's first draft
              next s = g · s + (1 - g) · tanh(candidate), g = sigmoid(gate)

Trainer and engine compute them by the one function here, each with its own kind of matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from slime_spec.checkpoints.families.dspark import GATED, VANILLA


def behind_token(
    kind: str,
    mix: Callable[[torch.Tensor], torch.Tensor] | None,
    before: torch.Tensor,
    states: torch.Tensor,
    memory: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what w2 reads [..., rank], and the ``memory`` [..., rank] that the next position starts from.

    ``before`` [..., rank] are rows of w1, ``states`` [..., hidden] the block's, ``mix`` the head's own projection.
    """
    if kind == VANILLA:
        return before, None
    assert mix is not None, "a head of this kind has a projection"
    if kind == GATED:
        return before * torch.sigmoid(mix(torch.cat([states, before], dim=-1))).to(before.dtype), None
    memory = torch.zeros_like(before) if memory is None else memory
    gate, candidate, output = mix(torch.cat([memory, before, states], dim=-1)).chunk(3, dim=-1)
    kept = torch.sigmoid(gate)
    return torch.tanh(output), kept * memory + (1.0 - kept) * torch.tanh(candidate)
