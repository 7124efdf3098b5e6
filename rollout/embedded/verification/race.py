"""A race draws a token: every token arrives after an exponential time over its probability, and the first one wins.

With E(v) independent exponentials, argmin E(v) / p(v) is v with probability p(v). It is the Gumbel-max trick: argmax
log p(v) + G(v) with G = -log E. Dividing p by its sum changes nothing, and a token of weight zero never arrives.

The noise E is a function of the request's seed, the position and the token id alone. A draft that runs the race of its
own q with the target's noise chooses the token that the target will choose more often than an argmax does, and at least
with probability s / (2 - s), s = sum min(p, q) (Gumbel coupling; arXiv 2408.07978, "drafter-invariant speculative
decoding"). The target's token does not depend on the draft, so the target-only walk emits p's tokens, the same ones as
without speculation: given the noise the token is fixed, and over the noise it is distributed as p.

    E(v) = -log(1 - w),  w = (2 n + 1) 2^-53,  n the top 52 bits of splitmix64(key + v golden)

w lies strictly between 0 and 1 and is exact in fp64; of equal arrivals, which take equal bits of 52, the first wins.
Integers alone make the noise, so that it is the same on every machine and for every batch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from rollout.embedded.kernels.library import kernels
from rollout.embedded.uniforms import GOLDEN

_GOLDEN = np.uint64(GOLDEN)


def race(weights: torch.Tensor, keys: npt.NDArray[np.uint64], token_ids: torch.Tensor | None = None) -> torch.Tensor:
    """Return the winner's column [rows] of every row of ``weights`` [rows, width], on the CPU, of any sum.

    ``keys`` [rows] are the rows' keys of Noise; ``token_ids`` [width] name the columns' tokens, None where column v is
    token v. A row of NaN or zeros, which is no distribution, gives column 0.
    """
    library = kernels() if weights.dtype == torch.float32 else None
    if library is not None:
        return library.race(weights, keys, token_ids)
    return race_in_numpy(weights, keys, token_ids)


def race_in_numpy(
    weights: torch.Tensor, keys: npt.NDArray[np.uint64], token_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Do the same without the kernels, row by row, with every logarithm."""
    names = np.arange(weights.shape[1]) if token_ids is None else token_ids.numpy()
    winners = []
    for row, key in zip(weights.double().numpy(), keys, strict=True):
        arrivals = np.full(len(row), np.inf)
        np.divide(exponentials(key, names), row, out=arrivals, where=row > 0.0)
        winners.append(int(arrivals.argmin()))
    return torch.tensor(winners)


def exponentials(key: np.uint64, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return E [tokens] of the tokens for one key."""
    bits = key + (token_ids.astype(np.uint64) + np.uint64(1)) * _GOLDEN  # splitmix64 adds golden first
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits = (bits ^ (bits >> np.uint64(31))) >> np.uint64(12)
    return -np.log1p(-(bits * 2.0**-52 + 2.0**-53))
