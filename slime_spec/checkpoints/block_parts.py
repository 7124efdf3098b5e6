"""These records describe the parts of a decoder block that are no plain attention and no plain MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LATENT_EPS = 1e-6


@dataclass(frozen=True)
class LatentAttention:
    """Describes latent attention (MLA, arXiv 2405.04434): keys and values come out of one small vector per token.

    ``query_rank`` is the width of the queries' own latent, None where queries come of the hidden state. A head's
    queries and keys have ``nope_dim`` columns without a position, then ``rope_dim`` rotated ones, which all heads'
    keys share; its values have ``value_dim``. ``interleaved``: rotated columns are pairs of neighbours in the weights.
    The latents' norms have LATENT_EPS, whatever the others have, as in the authors' code and in transformers.
    Example: ``LatentAttention(1536, 512, 128, 64, 128)`` is DeepSeek-V3's.
    """

    query_rank: int | None
    latent_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    interleaved: bool = True

    @property
    def key_dim(self) -> int:
        """Return the width of a head's queries and keys."""
        return self.nope_dim + self.rope_dim


@dataclass(frozen=True)
class Experts:
    """Describes a mixture of experts: a router gives each token to ``num_per_token`` of ``num_experts`` MLPs.

    Experts have ``width`` columns; ``num_shared`` of them are one MLP that every token takes besides.
    ``dense_layers`` have an ordinary MLP instead. The router scores by ``score``. With ``has_correction`` a stored bias
    for each expert is added to choose experts, not to weigh them, and of ``num_groups`` groups of experts the
    ``num_groups_per_token`` with the best pairs of experts are chosen from. Weights are divided by their sum where
    ``renormalises``, and multiplied by ``scaling``.
    Example: ``Experts(128, 8, 1536)`` is Qwen3-235B-A22B's.
    """

    num_experts: int
    num_per_token: int
    width: int
    num_shared: int = 0
    dense_layers: frozenset[int] = frozenset()
    score: Literal["softmax", "sigmoid"] = "softmax"
    has_correction: bool = False
    num_groups: int = 1
    num_groups_per_token: int = 1
    renormalises: bool = True
    scaling: float = 1.0

    def serve(self, layer: int) -> bool:
        """Return whether this layer (0-based) has experts."""
        return layer not in self.dense_layers

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers with experts of a model of so many, in order."""
        return tuple(filter(self.serve, range(num_layers)))
